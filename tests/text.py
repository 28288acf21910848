"""Text for tests, and its tokens."""

import json

TEXT = (
    "The quick brown fox jumps over the lazy dog.\nIn the beginning there was a loop:\n"
    "    for index in range(10):\n        total += index\n\nAnd the loop had an end, and the end was good.\n"
)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def jsonl(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts), encoding="utf-8")
    return path


def numbered(count, repeat=4):
    return [f"Document {number} of {count}.\n" + TEXT * repeat for number in range(count)]


def fail(*_, **__):
    raise AssertionError("the cache was not used")
