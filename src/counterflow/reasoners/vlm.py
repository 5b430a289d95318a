"""A vision-language model as the reasoner, through any endpoint that speaks OpenAI's chat API: hosted, vLLM, Ollama.

It is shown one or two camera images, the task in a sentence, what the gripper does and what it said before, and answers a
direction in the words of somebody who looks through the camera. What it answers is checked, mended where that is possible, asked
for again where it isn't; what fails for good (time, budget, nonsense) ends in a stated fallback, never in a crash. Every query
is noted in the run's folder with its image, answer, latency and tokens.

The key comes from the environment. It is never written down: not to the log, not into an error.

The idea of a VLM as FRS's reasoner: arXiv 2606.13675.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from counterflow.checks import COUNT, Range, check_names
from counterflow.errors import (
    InvalidInputError,
    MismatchError,
    MissingDependencyError,
    ReasonerError,
    StorageError,
)
from counterflow.files import reason_of
from counterflow.reasoners.direction import Direction, GripperCommand, View
from counterflow.reasoners.words import OGBENCH_WAYS, Axes

Fallback = Literal["defer", "repeat", "stay"]
Structure = Literal["schema", "object", "none"]

PROMPT = Path(__file__).parent / "prompts" / "direction.md"
PLACES = ("task", "gripper", "history", "ways")
"""What a prompt may name, as $task and so on."""
MOST_IMAGES = 2
LESS = 0.5
LONGEST_RATIONALE = 200
NO_KEY = "no-key"  # what local servers are sent, which look at none
SYNONYMS = {
    "forward": "away",
    "forwards": "away",
    "far": "away",
    "back": "nearer",
    "backward": "nearer",
    "backwards": "nearer",
    "near": "nearer",
    "closer": "nearer",
    "towards": "nearer",
    "upward": "up",
    "upwards": "up",
    "raise": "up",
    "lift": "up",
    "downward": "down",
    "downwards": "down",
    "lower": "down",
    "none": "stay",
    "still": "stay",
    "stop": "stay",
    "fine": "policy",
    "defer": "policy",
    "opened": "open",
    "closed": "close",
    "grasp": "close",
    "release": "open",
    "keep": "hold",
}

logger = logging.getLogger("counterflow.vlm")


@dataclass(frozen=True)
class VLMSettings:
    """Whom to ask, how often, and what to do when no answer comes.

    Attributes:
        model: as the endpoint knows it.
        base_url: the endpoint, for example http://localhost:8000/v1; None: OpenAI's own.
        key_variable: the environment's variable that holds the key; without it, an endpoint of your own is asked without one.
        every: ask every so many chunks; what was said last counts in between.
        asynchronous: ask while the last chunk is executed; the answer counts from the next one on.
        timeout: seconds for an answer, all attempts together.
        fallback: without an answer "defer" to the policy, "repeat" what was said last, or "stay".
        retries: attempts after the first, when the endpoint is busy, fails, or answers nonsense.
        back_off: seconds before the second attempt; it doubles, unless the endpoint says how long to wait.
        structure: how the answer's form is asked for: "schema" (JSON schema), "object" (any JSON), "none" (the prompt alone).
        history: how many earlier answers are shown.
        cache: take the answer to the same images and words from the run's folder.
        most_queries: answers asked for at most; then the fallback.
        most_tokens: tokens used at most; then the fallback.
        per_minute: queries a minute at most; further ones wait.
        answer_tokens: length of an answer at most.
        prompt: a template file of your own; None: `reasoners/prompts/direction.md`.

    Raises:
        InvalidInputError: a number is out of range, the endpoint is no web address or holds a secret, or the prompt can't be read
            or names what isn't there.
        UnknownNameError: there is no such fallback or structure.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    every: int = 1
    asynchronous: bool = False
    timeout: float = 20.0
    fallback: Fallback = "defer"
    retries: int = 3
    back_off: float = 0.5
    structure: Structure = "schema"
    history: int = 4
    cache: bool = True
    most_queries: int | None = None
    most_tokens: int | None = None
    per_minute: int | None = None
    answer_tokens: int = 300
    prompt: Path | None = None

    def __post_init__(self) -> None:
        """Check every setting."""
        if not self.model:
            raise InvalidInputError("no model was named; expected a name that the endpoint knows.")
        check_names(self, fallback=Fallback, structure=Structure)
        for name, least in (("every", 1), ("retries", 0), ("history", 0), ("answer_tokens", 16)):
            Range(least, integer=True).check_all(self, name)
        for name in ("most_queries", "most_tokens", "per_minute"):
            if getattr(self, name) is not None:
                COUNT.check_all(self, name)
        if self.base_url is not None:
            _check_url(self.base_url)
        if not (0 < self.timeout <= 600 and 0 <= self.back_off <= 60):
            raise InvalidInputError(
                f"timeout is {self.timeout}, back_off {self.back_off}; expected seconds in (0, 600] and [0, 60]."
            )
        self.template()

    def template(self) -> Template:
        """Return the prompt.

        Raises:
            InvalidInputError: it can't be read, or names what isn't there.
        """
        path = PROMPT if self.prompt is None else Path(self.prompt)
        try:
            template = Template(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"the prompt {path} can't be read: {error}.") from error
        named = set(template.get_identifiers())
        if not template.is_valid() or not named <= set(PLACES) or "task" not in named:
            raise InvalidInputError(
                f"the prompt {path} names {sorted(named)}; expected $task, and of $gripper, $history and $ways what you like (a "
                "dollar sign of its own is written $$)."
            )
        return template

    def to_json(self) -> dict[str, Any]:
        """Return what determines the answers, as plain values."""
        return {
            "model": self.model,
            "base_url": self.base_url,
            "every": self.every,
            "asynchronous": self.asynchronous,
            "fallback": self.fallback,
            "history": self.history,
            "prompt": hashlib.sha256(self.template().template.encode()).hexdigest()[:12],
        }


@dataclass(frozen=True)
class Answer:
    """What came of a query.

    Attributes:
        direction: what was said, or None where nothing usable was.
        rationale: why, in the model's words.
        text: the answer as it came.
        cached: whether it was taken from the folder.
        attempts: requests that were made.
        faults: what went wrong on the way, in words.
        tokens: used in all attempts.
        seconds: until the answer was there.
    """

    direction: Direction | None
    rationale: str = ""
    text: str = ""
    cached: bool = False
    attempts: int = 0
    faults: tuple[str, ...] = ()
    tokens: int = 0
    seconds: float = 0.0


class NonsenseError(InvalidInputError):
    """An answer that says no direction; the message says what is wrong with it, for the model to read."""


def understand(text: str, ways: Mapping[str, Axes] = OGBENCH_WAYS) -> tuple[Direction, str]:
    """Read an answer, mending what can be mended: words around the JSON, fences, capitals, synonyms, what is left out.

    Args:
        text: the answer.
        ways: the directions' world axes.

    Returns:
        The direction, and the rationale.

    Raises:
        NonsenseError: it says no direction.
    """
    content = _json_in(text)
    said = content.get("direction", content.get("move", content.get("action")))
    words = [SYNONYMS.get(word, word) for word in _words(said)]
    if not words:
        raise NonsenseError(f'"direction" is {said!r}; expected one of {_names(ways)}.')
    unknown = [word for word in words if word not in (*ways, "stay", "policy")]
    if unknown:
        raise NonsenseError(f'"direction" is {unknown[0][:40]!r}; expected one of {_names(ways)}.')
    rationale = " ".join(str(content.get("rationale", content.get("reasoning", ""))).split())[:LONGEST_RATIONALE]
    if "policy" in words:
        return Direction(defer=True), rationale
    gripper_words = [SYNONYMS.get(word, word) for word in _words(content.get("gripper", "policy"))] or ["policy"]
    gripper: Any = gripper_words[0] if gripper_words[0] in get_args(GripperCommand) else None
    if gripper is None:
        raise NonsenseError(f'"gripper" is {gripper_words[0][:40]!r}; expected "open", "close", "hold" or "policy".')
    total = np.clip(np.sum([ways[word] for word in words if word in ways] or [(0, 0, 0)], axis=0), -1, 1).astype(int)
    x, y, z = total.tolist()
    less = str(content.get("amount", "full")).lower() in ("less", "half", "small", "little", "0.5")
    return Direction((x, y, z), LESS if less else 1.0, gripper), rationale


def _names(ways: Mapping[str, Axes]) -> str:
    return ", ".join(f'"{name}"' for name in (*ways, "stay", "policy"))


def _words(value: Any) -> list[str]:
    """Return the words of a text or of a list of texts, in small letters."""
    if isinstance(value, list):
        return [word for one in value[:3] for word in _words(one)]
    return re.findall(r"[a-z]+", value.lower())[:3] if isinstance(value, str) else []


def _json_in(text: str) -> dict[str, Any]:
    """Return the first JSON object in a text."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text[match.start() :])
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return {str(name).lower(): value for name, value in found.items()}
    raise NonsenseError("it holds no JSON object.")


def schema_of(ways: Mapping[str, Axes]) -> dict[str, Any]:
    """Return the JSON schema of an answer."""
    properties = {
        "rationale": {"type": "string"},
        "direction": {"type": "string", "enum": [*ways, "stay", "policy"]},
        "amount": {"type": "string", "enum": ["full", "less"]},
        "gripper": {"type": "string", "enum": list(get_args(GripperCommand))},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


class VLMClient:
    """Asks an endpoint; what several reasoners (the rows of an environment) share: cache, limits and log. Safe between threads.

    Args:
        settings: whom, and how.
        folder: where queries, images and cached answers go; None: nowhere.
        clock: seconds that only grow.
        sleep: waits.

    Raises:
        MissingDependencyError: the package openai is missing.
        InvalidInputError: OpenAI's own endpoint is asked and there is no key.
    """

    def __init__(
        self,
        settings: VLMSettings,
        folder: Path | str | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingDependencyError(
                f"a VLM as the reasoner needs the package openai ({error}). Install it: pip install 'counterflow[vlm]'."
            ) from error
        self._openai: Any = openai
        self.settings = settings
        self._folder = None if folder is None else Path(folder)
        self._clock, self._sleep = clock, sleep
        self._key = os.environ.get(settings.key_variable, "")
        if not self._key and settings.base_url is None:
            raise InvalidInputError(
                f"the environment's {settings.key_variable} is not set, and OpenAI's own endpoint wants a key. Set it, or name "
                "an endpoint of your own (--vlm-url http://localhost:8000/v1)."
            )
        self._client: Any = openai.OpenAI(api_key=self._key or NO_KEY, base_url=settings.base_url, max_retries=0)
        self._lock = threading.Lock()
        self._times: deque[float] = deque()
        self._known: dict[str, str] = {}
        self.queries = self.tokens = self.fallbacks = self.cached = 0

    def ask(
        self, prompt: str, images: list[npt.NDArray[np.uint8]], ways: Mapping[str, Axes], about: Mapping[str, Any]
    ) -> Answer:
        """Ask for a direction, and note what came of it.

        Args:
            prompt: the words.
            images: (height, width, 3) uint8 each.
            ways: the directions' world axes.
            about: what to note beside it (episode, chunk).

        Raises:
            ReasonerError: the endpoint refuses the key, the model or the request: asking again would not help.
        """
        began = self._clock()
        pictures = [_jpeg(image) for image in images]
        name = _digest(self.settings.model, prompt, *pictures)
        answer = self._from_cache(name, ways)
        if answer is None:
            answer = self._over_the_line(prompt, pictures, ways, began)
            if answer.direction is not None and self.settings.cache:
                self._remember(name, answer.text)
        answer = replace(answer, seconds=round(self._clock() - began, 4))
        with self._lock:
            self.tokens += answer.tokens
            self.cached += answer.cached
            self.fallbacks += answer.direction is None
        self._note(name, prompt, pictures, answer, about)
        return answer

    def _over_the_line(self, prompt: str, pictures: list[bytes], ways: Mapping[str, Axes], began: float) -> Answer:
        settings, faults = self.settings, list[str]()
        attempts = tokens = 0
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        for picture in pictures:
            url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        wait = settings.back_off
        text = ""
        while attempts <= settings.retries:
            left = settings.timeout - (self._clock() - began)
            if left <= 0:
                faults.append(f"no answer within {settings.timeout:g} seconds")
                break
            if (limit := self._take_from_budget(tokens)) is not None:
                faults.append(limit)
                break
            if not self._wait_for_turn(left):
                with self._lock:
                    self.queries -= 1  # it was not asked
                faults.append(f"{settings.per_minute} queries a minute were used up")
                break
            attempts += 1
            try:
                left = max(0.05, settings.timeout - (self._clock() - began))
                text, used = self._request(messages, ways, left)
                tokens += used
                direction, rationale = understand(text, ways)
                return Answer(direction, rationale, text, False, attempts, tuple(faults), tokens)
            except NonsenseError as error:
                faults.append(f"nonsense: {error}")
                # The answer goes back with what is wrong with it, once; its later attempts replace the earlier.
                messages = [
                    messages[0],
                    {"role": "assistant", "content": text[:2000]},
                    {
                        "role": "user",
                        "content": f"That can't be used: {error} Answer with the JSON object and nothing else.",
                    },
                ]
                continue
            except self._openai.APIStatusError as error:
                status = int(error.status_code)
                fault = f"HTTP {status}: {self._without_key(str(error))[:300]}"
                if status not in (408, 409, 429) and status < 500:
                    self._note_refusal(fault)
                    raise ReasonerError(
                        f"the endpoint refused: {fault}. Check the model's name, the endpoint, and the key in "
                        f"{settings.key_variable}; a server without JSON schemas wants another --vlm-structure."
                    ) from None
                faults.append(fault)
                wait_now = _retry_after(error.response.headers.get("retry-after"), wait)
            except self._openai.APITimeoutError:
                faults.append(f"no answer within {left:.3g} seconds")
                wait_now = 0.0
            except (
                self._openai.OpenAIError,
                ValueError,
            ) as error:  # no connection, or an answer that is none of the API's
                faults.append(self._without_key(f"{type(error).__name__}: {error}")[:300])
                wait_now = wait
            wait *= 2
            left = settings.timeout - (self._clock() - began)
            if attempts <= settings.retries and wait_now < left:
                self._sleep(wait_now)
            elif attempts <= settings.retries:
                faults.append(f"the endpoint wants {wait_now:g} seconds, and {max(left, 0):.3g} are left")
                break
        return Answer(None, "", text, False, attempts, tuple(faults), tokens)

    def _request(self, messages: list[dict[str, Any]], ways: Mapping[str, Axes], timeout: float) -> tuple[str, int]:
        formats: dict[str, dict[str, Any]] = {
            "schema": {
                "type": "json_schema",
                "json_schema": {"name": "direction", "strict": True, "schema": schema_of(ways)},
            },
            "object": {"type": "json_object"},
        }
        form = formats.get(self.settings.structure)
        more = {} if form is None else {"response_format": form}
        answer = self._client.chat.completions.create(
            model=self.settings.model,
            messages=messages,
            max_tokens=self.settings.answer_tokens,
            temperature=0,
            timeout=timeout,
            **more,
        )
        usage = getattr(answer, "usage", None)
        used = int(getattr(usage, "total_tokens", 0) or 0)
        choices = getattr(answer, "choices", None) or []
        text = "" if not choices else str(getattr(choices[0].message, "content", "") or "")
        return self._without_key(text), used  # before it reaches the cache, a note or a warning

    # Limits

    def _take_from_budget(self, tokens: int) -> str | None:
        """Count a query; return what has run out, if anything has."""
        settings = self.settings
        with self._lock:
            if settings.most_queries is not None and self.queries >= settings.most_queries:
                return f"the budget of {settings.most_queries} queries is used up"
            if settings.most_tokens is not None and self.tokens + tokens >= settings.most_tokens:
                return f"the budget of {settings.most_tokens} tokens is used up"
            self.queries += 1
        return None

    def _wait_for_turn(self, patience: float) -> bool:
        """Keep to so many queries a minute; return False where the turn comes too late."""
        most = self.settings.per_minute
        if most is None:
            return True
        waited = 0.0
        while True:
            with self._lock:
                now = self._clock()
                while self._times and now - self._times[0] >= 60:
                    self._times.popleft()
                if len(self._times) < most:
                    self._times.append(now)
                    return True
                wait = 60 - (now - self._times[0])
            if waited + wait > patience:
                return False
            waited += wait
            self._sleep(wait)

    # Files

    def _from_cache(self, name: str, ways: Mapping[str, Axes]) -> Answer | None:
        if not self.settings.cache:
            return None
        text = self._known.get(name)
        if text is None and self._folder is not None:
            try:
                text = (self._folder / "cache" / f"{name}.txt").read_text()
            except OSError:
                return None
        if text is None:
            return None
        try:
            direction, rationale = understand(text, ways)
        except NonsenseError:
            return None
        return Answer(direction, rationale, text, cached=True)

    def _remember(self, name: str, text: str) -> None:
        self._known[name] = text
        self._write(Path("cache") / f"{name}.txt", text.encode())

    def _note(self, name: str, prompt: str, pictures: list[bytes], answer: Answer, about: Mapping[str, Any]) -> None:
        images = []
        for picture in pictures:
            image = Path("images") / f"{_digest(picture)}.jpg"
            self._write(image, picture, once=True)
            images.append(str(image))
        direction = answer.direction
        self._append(
            {
                **about,
                "query": name,
                "model": self.settings.model,
                "images": images,
                "prompt": prompt,
                "answer": answer.text,
                "direction": None if direction is None else list(direction.axes),
                "gripper": None if direction is None else direction.gripper,
                "defer": None if direction is None else direction.defer,
                "rationale": answer.rationale,
                "fallback": self.settings.fallback if direction is None else None,
                "cached": answer.cached,
                "attempts": answer.attempts,
                "faults": list(answer.faults),
                "tokens": answer.tokens,
                "seconds": answer.seconds,
            }
        )
        if answer.faults:
            logger.warning("query %s: %s", name, "; ".join(answer.faults))

    def _note_refusal(self, fault: str) -> None:
        self._append({"model": self.settings.model, "refused": fault})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        line = self._without_key(json.dumps(entry)) + "\n"
        with self._lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with (self._folder / "queries.jsonl").open("a") as file:
                    file.write(line)
            except OSError as error:
                raise StorageError(f"the query can't be noted in {self._folder}: {reason_of(error)}.") from error

    def _write(self, name: Path, content: bytes, *, once: bool = False) -> None:
        if self._folder is None:
            return
        path = self._folder / name
        if once and path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"{path} can't be written: {reason_of(error)}.") from error

    def _without_key(self, text: str) -> str:
        """Take the key out of a text: a server may send back what it was sent."""
        return text.replace(self._key, "***") if self._key else text


class VLMReasoner:
    """Asks a VLM for every direction, or every n-th.

    Args:
        client: asks; several reasoners may share it.
        task: the task in a sentence.
        ways: which world axis each direction is, as seen in the picture.
    """

    looks = True
    """Whoever runs it puts camera images into the view, as "image/<name>" (height, width, 3) uint8."""

    def __init__(self, client: VLMClient, task: str, ways: Mapping[str, Axes] = OGBENCH_WAYS) -> None:
        self._client, self._task, self._ways = client, task, dict(ways)
        self._template = client.settings.template()
        self._thread: ThreadPoolExecutor | None = None
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forget the last episode; an answer that is still under way is nobody's."""
        self._seed, self._decisions = seed, 0
        self._last: Direction | None = None
        self._history: deque[str] = deque(maxlen=self._client.settings.history or 1)
        self._under_way: Future[Answer] | None = None

    def decide(self, view: View) -> Direction:
        """Say the direction for the next chunk.

        Raises:
            MismatchError: the view holds no image.
            ReasonerError: the endpoint refuses.
        """
        settings = self._client.settings
        due = self._decisions % settings.every == 0
        self._decisions += 1
        if not settings.asynchronous:
            if due or self._last is None:
                self._take(self._client.ask(*self._question(view)))
            return self._last or self._instead()
        if self._under_way is not None and self._under_way.done():
            under_way, self._under_way = self._under_way, None  # a refusal is raised once, and then asked about again
            self._take(under_way.result())
        if self._under_way is None and (due or self._last is None):
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="counterflow-vlm")
            self._under_way = self._thread.submit(self._client.ask, *self._question(view))
        return self._last or self._instead()

    def _take(self, answer: Answer) -> None:
        direction = answer.direction
        if direction is None:
            self._last = self._last if self._client.settings.fallback == "repeat" else self._instead()
            return
        self._last = direction
        said = "policy" if direction.defer else self._in_words(direction)
        self._history.append(
            f"- {said}, gripper {direction.gripper}" + (f": {answer.rationale}" if answer.rationale else "")
        )

    def _instead(self) -> Direction:
        """Return what counts without an answer."""
        return Direction() if self._client.settings.fallback == "stay" else Direction(defer=True)

    def _question(self, view: View) -> tuple[str, list[npt.NDArray[np.uint8]], Mapping[str, Axes], dict[str, Any]]:
        images = [view[name] for name in sorted(view) if name.startswith("image/")][:MOST_IMAGES]
        if not images:
            raise MismatchError(
                "the VLM was shown no image. Run it where frames are drawn: eval, record and the cockpit do so by themselves."
            )
        shown = self._client.settings.history and self._history
        prompt = self._template.substitute(
            task=self._task,
            gripper=_gripper_in_words(view),
            history="\n".join(self._history) if shown else "- nothing yet",
            ways=", ".join(f'"{name}"' for name in self._ways),
        )
        about = {"seed": self._seed, "chunk": self._decisions - 1}
        return prompt, [np.asarray(image, np.uint8) for image in images], self._ways, about

    def _in_words(self, direction: Direction) -> str:
        words = [
            name
            for name, axes in self._ways.items()
            if any(a * b > 0 for a, b in zip(axes, direction.axes, strict=True))
        ]
        return (" and ".join(words) or "stay") + (", less" if direction.amount < 1 else "")


def _check_url(url: str) -> None:
    """Raise `InvalidInputError` unless it is a web address that may be written down."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        right = False
    if not right:
        raise InvalidInputError("the endpoint is no web address; expected one such as http://localhost:8000/v1.")
    if "@" in parts.netloc or parts.query:
        raise InvalidInputError(
            f"the address of the endpoint at {parts.hostname} holds a name, a password or a query, and addresses are written "
            "into results. Put the key into the environment (--vlm-key-variable names the variable)."
        )


def _gripper_in_words(view: View) -> str:
    opening, contact = view.get("proprio/gripper_opening"), view.get("proprio/gripper_contact")
    if opening is None:
        return "unknown"
    closed = float(np.ravel(opening)[0])  # OGBench: 0 is open, 1 is closed
    words = "open" if closed < 0.2 else "closed" if closed > 0.85 else f"{round(100 * closed)}% closed"
    holds = contact is not None and float(np.ravel(contact)[0]) > 0.3
    return words + (", touching something" if holds else "")


def _jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    if image.ndim != 3 or image.shape[2] != 3:
        raise InvalidInputError(f"an image for the VLM has shape {image.shape}; expected (height, width, 3).")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        found.update(len(raw).to_bytes(8, "little") + raw)
    return found.hexdigest()[:20]


def _retry_after(header: str | None, otherwise: float) -> float:
    """Return the seconds that an endpoint asks for, where it does."""
    try:
        return max(0.0, float(header)) if header is not None else otherwise
    except ValueError:
        return otherwise
