"""Random damage to files and JSON; all of it comes from a random.Random, so a seed repeats it."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

NUMBERS = [0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 10**30]
NUMBERS += [0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", "0", "1", "a", " ", "\n", "0101", "9" * 5000, "\0", "\ud800", "../..", "/", "\u0663", "[", "1e999"]
DEEP = "<nested deep>"  # stands for an array within an array within an array, in JSON's text
LENGTHS = [0, 1, 2, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]


def any_value(random: Random, depth: int = 0) -> Any:
    """A random JSON value: mostly small, sometimes absurd."""
    kind = random.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return random.choice([None, True, False])
    if kind in (1, 2):
        return random.choice(NUMBERS)
    if kind == 3:
        return random.choice([*TEXTS, DEEP])
    if kind == 4:
        return random.choice([[], {}, random.randrange(-5, 300), random.random()])
    count = random.randrange(4)
    if kind == 5:
        return {random.choice([*TEXTS, "step", "name"]): any_value(random, depth + 1) for _ in range(count)}
    return [any_value(random, depth + 1) for _ in range(count)]


def damaged_value(random: Random, value: Any) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, removed, doubled or moved."""
    root = [copy.deepcopy(value)]
    for _ in range(random.randrange(1, 4)):
        places = list(_places(root))
        container, key = random.choice(places)
        action = random.randrange(6)
        if action == 0 and container is not root:
            del container[key]
        elif action == 1:
            container[key] = [container[key]]
        elif action == 2:
            other, place = random.choice(places)
            container[key] = copy.deepcopy(other[place])
        elif action == 3 and isinstance(container, dict):
            container[random.choice([*TEXTS, *map(str, container)])] = any_value(random)
        elif action == 4 and isinstance(container, list) and container is not root:
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[key] = any_value(random)
        if not root:
            root.append(None)
    return root[0]


def _places(container: Any) -> Any:
    """Every (container, key) in and below a container."""
    for key in list(container) if isinstance(container, dict) else range(len(container)):
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from _places(container[key])


def damaged_json(random: Random, value: Any, *, indent: int | None = 1) -> bytes:
    """A JSON value as text after damage to its parts, to the text, or both."""
    if random.randrange(4):
        value = damaged_value(random, value)
    text = json.dumps(value, indent=indent)
    depth = random.choice([70, 300, 900, 2000, 100_000])
    text = text.replace(json.dumps(DEEP), "[" * depth + "]" * depth)
    action = random.randrange(8)
    if action == 0:  # a key twice
        place = random.choice([index for index, letter in enumerate(text) if letter == "{"] or [0])
        names = list(value) if isinstance(value, dict) and value else ["a"]
        twice = f"{json.dumps(random.choice(names))}: {json.dumps(any_value(random))}, "
        text = text[: place + 1] + twice + text[place + 1 :]
    elif action == 1:  # nested deeper than a parser's stack
        deep = random.choice(["[", '{"a":']) * random.choice([10, 1000, 100_000])
        place = text.find(":") + 1
        text = text[:place] + deep + text[place:]
    elif action == 2:  # more digits than Python converts
        place = text.find(":") + 1
        text = text[:place] + random.choice(["", "-", "0."]) + "9" * 6000 + text[place:]
    content = text.encode(errors="surrogatepass")
    return damaged_bytes(random, content) if random.randrange(3) == 0 else content


def damaged_bytes(random: Random, content: bytes) -> bytes:
    """Bytes after one to four of: flipped bits, other bytes, a cut, a removed, doubled or inserted stretch."""
    data = bytearray(content)
    for _ in range(random.randrange(1, 5)):
        action = random.randrange(7)
        place = random.randrange(len(data) + 1)
        end = min(len(data), place + random.choice([1, 2, 4, 8, 30, 200]))
        if action == 0 and place < len(data):
            data[place] ^= 1 << random.randrange(8)
        elif action == 1:
            data[place:end] = bytes(random.randrange(256) for _ in range(end - place))
        elif action == 2:
            del data[place:]
        elif action == 3:
            del data[place:end]
        elif action == 4:
            data[place:place] = data[place:end]
        elif action == 5:
            data[place:place] = bytes(random.randrange(256) for _ in range(random.randrange(1, 20)))
        else:
            word = struct.pack("<Q", random.choice(LENGTHS))[: random.choice([4, 8])]
            data[place : place + len(word)] = word
    return bytes(data)


def damaged_words(random: Random, content: bytes) -> bytes:
    """Bytes of which one to three numbers of 4 or 8 bytes are others, as a length or a count may be."""
    data = bytearray(content)
    for _ in range(random.randrange(1, 4)):
        place = random.randrange(len(data) - 8)
        word = random.choice(LENGTHS) if random.randrange(3) else random.randrange(300)
        data[place : place + 8] = struct.pack("<Q", word)[: random.choice([4, 8])].ljust(8, b"\0")
    return bytes(data)


def damaged_safetensors(random: Random, content: bytes) -> bytes:
    """A safetensors file after damage to its bytes, to its header alone, or to the header's JSON."""
    action = random.randrange(4)
    if action == 0:
        return damaged_bytes(random, content)
    size = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + size], content[8 + size :]
    if action == 1:
        return content[:8] + damaged_bytes(random, header) + data
    header = damaged_json(random, json.loads(header), indent=None)
    size = len(header) if random.randrange(4) else random.choice(LENGTHS)
    return struct.pack("<Q", size) + header + data


def damaged_lines(random: Random, content: bytes) -> bytes:
    """Text after damage to its lines or its fields, or to its bytes."""
    lines = [line.split(b"\t") for line in content.split(b"\n")]
    for _ in range(random.randrange(1, 4)):
        fields = random.choice(lines)
        action = random.randrange(5)
        if action == 0:
            lines.remove(fields)
        elif action == 1:
            lines.insert(random.randrange(len(lines) + 1), list(fields))
        elif action == 2:
            fields.append(random.choice(fields))
        else:
            text = random.choice([str(random.choice(NUMBERS)), *TEXTS, "nan", "0x10", "1_0"])
            fields[random.randrange(len(fields))] = text.encode(errors="surrogatepass")
        if not lines:
            lines = [[b""]]
    text = b"\n".join(b"\t".join(fields) for fields in lines)
    return damaged_bytes(random, text) if random.randrange(3) == 0 else text
