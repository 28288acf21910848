"""Questions about facts hidden in long text: the task families of RULER (arXiv 2404.06654), on generated text.

The answer is the natural continuation of every prompt, so base models can answer too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from consa.data.prompts import for_prompts
from consa.errors import ConsaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_NEEDLES = 4
"""Keys, values or hops in one prompt, as in RULER."""

SPARE_TOKENS = 4
"""Additional tokens allowed per answer, for words or line breaks between answers."""


@dataclass(frozen=True)
class Example:
    """A prompt and the answers that its continuation should contain."""

    prompt: str  # a long text that ends with the beginning of the answer
    answers: tuple[str, ...]  # texts that must all appear in the continuation


@dataclass(frozen=True)
class Puzzle:
    """An example whose length is not fixed yet."""

    opening: str  # beginning of the text
    hidden: tuple[str, ...]  # sentences to place in the text, in this order
    question: str  # end of the text
    answers: tuple[str, ...]  # as in `Example`
    filler: Iterator[str]  # endless pieces of text to put around the hidden sentences


def single(rng: random.Random) -> Puzzle:
    """Recall one number."""
    number = _number(rng)
    return Puzzle(
        "A special magic number is hidden in the following text. Remember it.",
        (f"The special magic number is {number}.",),
        "What is the special magic number mentioned in the text? The special magic number is",
        (number,),
        _sentences(rng),
    )


def multi_key(rng: random.Random) -> Puzzle:
    """Recall the number of one of several things."""
    numbers = _numbers_of_things(rng)
    thing = rng.choice(list(numbers))
    return Puzzle(
        "Special magic numbers for several things are hidden in the following text. Remember them.",
        tuple(f"The special magic number for {key} is {number}." for key, number in numbers.items()),
        f"What is the special magic number for {thing}? The special magic number for {thing} is",
        (numbers[thing],),
        _sentences(rng),
    )


def multi_query(rng: random.Random) -> Puzzle:
    """Recall the numbers of several things."""
    numbers = _numbers_of_things(rng)
    *others, last = rng.sample(list(numbers), len(numbers))
    things = f"{', '.join(others)} and {last}"
    return Puzzle(
        "Special magic numbers for several things are hidden in the following text. Remember them.",
        tuple(f"The special magic number for {key} is {number}." for key, number in numbers.items()),
        f"What are the special magic numbers for {things}? The special magic numbers for {things}, in this order, are",
        tuple(numbers[thing] for thing in (*others, last)),
        _sentences(rng),
    )


def multi_value(rng: random.Random) -> Puzzle:
    """Recall several numbers of one thing."""
    thing = rng.choice(THINGS)
    numbers = tuple(_number(rng) for _ in range(NUM_NEEDLES))
    return Puzzle(
        f"Several special magic numbers for {thing} are hidden in the following text. Remember all of them.",
        tuple(f"One of the special magic numbers for {thing} is {number}." for number in numbers),
        f"What are all the special magic numbers for {thing}? The special magic numbers for {thing} are",
        numbers,
        _sentences(rng),
    )


def variable_tracking(rng: random.Random) -> Puzzle:
    """Name the variables in a chain of assignments that all have one value."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = tuple("".join(rng.sample(letters, 5)) for _ in range(NUM_NEEDLES + 1))
    value = str(rng.randrange(10_000, 100_000))
    assignments = [f"VAR {name} = {before}." for name, before in zip(names, (value, *names), strict=False)]
    return Puzzle(
        "Variables are assigned values in the following text. Remember which variables have the same value.",
        tuple(assignments),
        f"Which variables have the value {value}? The variables that have the value {value} are VAR",
        names,
        _sentences(rng),
    )


def common_words(rng: random.Random) -> Puzzle:
    """Name the most frequent words of a long list; a window sees a fair sample of it."""
    words = rng.sample(THINGS, len(THINGS))
    common, others = words[:3], words[3:]

    def pieces() -> Iterator[str]:
        while True:
            yield rng.choice(common if rng.random() < 0.5 else others) + ","

    return Puzzle(
        "Below is a list of words. Three of them appear very often. Remember those three.\n\n",
        (),
        "\n\nThe three words that appear most often in this list are:",
        tuple(common),
        pieces(),
    )


TASKS: dict[str, Callable[[random.Random], Puzzle]] = {
    task.__name__: task for task in (single, multi_key, multi_query, multi_value, variable_tracking, common_words)
}
"""Task name -> function that draws a puzzle."""


def examples(task: str, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int = 0) -> list[Example]:
    """Make examples of one task and length; the same arguments give the same examples.

    Args:
        task: one of `TASKS`.
        tokenizer: determines the length in tokens.
        length: maximum tokens of prompt and answer together; prompts come close to it.
        count: number of examples; the depths of the hidden sentences are spread evenly over them.
        seed: random seed of the hidden facts and the text around them.

    Raises:
        ConsaError: there is no such task, or its prompt does not fit into `length`.
    """
    if task not in TASKS:
        raise ConsaError(f"retrieval task must be one of {', '.join(TASKS)}, got {task!r}")
    tokenizer = for_prompts(tokenizer)
    if count < 1:
        raise ConsaError(f"the number of examples must be at least 1, got {count}")
    return [
        _example(task, tokenizer, length, (index + 0.5) / count, random.Random(f"{task} {seed} {length} {index}"))
        for index in range(count)
    ]


def num_answer_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    """Maximum new tokens for an answer: the answers with commas between, and `SPARE_TOKENS` for each."""
    text = " " + ", ".join(example.answers)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + SPARE_TOKENS * len(example.answers)


def answered(example: Example, continuation: str) -> float:
    """The share of the answers that appear in the continuation."""
    text = continuation.casefold()
    return sum(answer.casefold() in text for answer in example.answers) / len(example.answers)


def _example(task: str, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, rng: random.Random) -> Example:
    """An example of nearly `length` tokens, with each hidden sentence at `depth` of its part of the text."""
    puzzle = TASKS[task](rng)
    room = length - num_answer_tokens(Example("", puzzle.answers), tokenizer)
    filler: list[str] = []

    def prompt(pieces: int) -> str:
        filler.extend(islice(puzzle.filler, max(0, pieces - len(filler))))
        text, rest = [], 0
        for index, sentence in enumerate(puzzle.hidden):
            place = round((index + depth) / len(puzzle.hidden) * pieces)
            text += [*filler[rest:place], sentence]
            rest = place
        return " ".join([puzzle.opening, *text, *filler[rest:pieces], puzzle.question])

    def num_tokens(pieces: int) -> int:
        return len(tokenizer(prompt(pieces), verbose=False)["input_ids"])

    shortest = num_tokens(0)
    if shortest > room:
        raise ConsaError(f"retrieval task {task!r} does not fit into {length} tokens; raise the length")
    # Numbers of pieces: one that fits, one that does not, as a piece has a token or more, and the next to try.
    fits, too_many, pieces = 0, room + 1, 1
    while too_many - fits > 1:
        tokens = num_tokens(pieces)
        fits, too_many = (pieces, too_many) if tokens <= room else (fits, pieces)
        expected = (room - shortest) * pieces // (tokens - shortest)
        pieces = min(max(expected, fits + 1), too_many - 1)
    return Example(prompt(fits), puzzle.answers)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _numbers_of_things(rng: random.Random) -> dict[str, str]:
    return {thing: _number(rng) for thing in rng.sample(THINGS, NUM_NEEDLES)}


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        yield " ".join(rng.choice(part) for part in (WHEN, WHO, DID, WHERE))


THINGS = (
    "apple", "river", "candle", "garden", "mirror", "tractor", "violin", "pepper", "blanket", "harbour",
    "lantern", "mountain", "pencil", "rabbit", "saddle", "teapot", "umbrella", "village", "window", "zebra",
    "anchor", "basket", "camera", "dragon", "engine", "feather", "guitar", "hammer", "island", "jacket",
    "kitchen", "ladder", "monkey", "needle", "orange", "pillow", "quarry", "ribbon", "spider", "tunnel",
)  # fmt: skip
WHEN = (
    "Early in the morning,", "After the long winter,", "On the day of the market,", "When the rain had stopped,",
    "Before anyone else was awake,", "Towards the end of the summer,", "As so often in those years,",
    "Some weeks later,", "In spite of the cold,", "Without saying a word,", "Once the bells had rung,",
    "To everybody's surprise,",
)  # fmt: skip
WHO = (
    "the old fisherman", "a teacher from the next town", "the two sisters", "our neighbour's son", "the young doctor",
    "a group of travellers", "the baker and his wife", "the captain", "one of the children", "my grandmother",
    "the new librarian", "a quiet man in a grey coat",
)  # fmt: skip
DID = (
    "walked slowly", "carried a heavy box", "waited for a letter", "told a long story", "looked for the lost dog",
    "repaired a broken chair", "sat and read the newspaper", "sang an old song", "bought bread and cheese",
    "painted a small boat", "talked about the weather", "planted a row of trees",
)  # fmt: skip
WHERE = (
    "by the river.", "in front of the church.", "along the road to the coast.", "at the edge of the forest.",
    "behind the railway station.", "under the stone bridge.", "on the steps of the town hall.",
    "near the empty mill.", "in the shade of the wall.", "beside the open window.", "at the top of the hill.",
    "not far from the harbour.",
)  # fmt: skip
