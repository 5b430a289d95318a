"""What steering a vision-language-action model costs: time of the prefix and of the steps, and peak memory.

    .venv-lerobot/bin/python benchmarks/vla_latency/run.py      # the environment of 'make lerobot'

builds networks shaped like SmolVLA and pi0.5 (LeRobot's own classes, random weights, no download: time and memory don't
depend on what the weights are), at their real sizes on a GPU and reduced on a processor, and measures one decision (an
observation, batch 1) of the base policy, flow reversal steering, sample-and-rank with 16 candidates, and guidance by a
critic's gradient. Writes `results/<device>.json` and the tables of README.md. `--only-report` leaves out the measuring.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from counterflow.experiments.evaluate import machine
from counterflow.files import write_between, write_json
from counterflow.policies.lerobot import LeRobotPolicy
from counterflow.steering import FlowReversal, NearestToReference, SteeredPolicy, SteeringContext

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STATE, ACTION, CAMERAS, TASK = 8, 7, ("observation.images.top", "observation.images.wrist"), "put the cup on the plate"
Size = Literal["real", "reduced"]
Kind = Literal["smolvla", "pi05"]


@dataclass(frozen=True)
class Arguments:
    """Measure what steering a VLA costs."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    size: Size | None = None
    """real or reduced networks; default: real on a GPU, reduced on a processor."""
    kinds: tuple[Kind, ...] = ("smolvla", "pi05")
    """What to build."""
    steps: int = 10
    """K, denoising steps (and steps of the reversal)."""
    candidates: int = 16
    """n of sample-and-rank."""
    repeats: int = 5
    """Decisions that are timed for each way, by turns; the fastest is reported: other work on the machine disturbs it least."""
    threads: int = 1
    """Of torch on the processor; several that wait for each other beside other work measure the waiting."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of pi0.5's weights; default: bfloat16 on a GPU, float32 on a processor. SmolVLA computes in float32."""
    compiled: bool | None = None
    """Whether denoising steps are compiled; default: on a GPU."""
    only_report: bool = False
    """Write the tables from the results that are there."""


@dataclass(frozen=True)
class Sizes:
    """What makes a network large."""

    vision: dict[str, int]
    text: dict[str, int]
    image: int
    expert: dict[str, int] = field(default_factory=dict)
    layers: int = 0


def _vit(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    """Name a transformer's sizes as its configuration does."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# SmolVLM2-500M, of which SmolVLA takes 16 layers; PaliGemma 3B (Gemma 2B, SigLIP so400m) and an expert of 300M for pi0.5.
SMOLVLA: dict[Size, Sizes] = {
    "real": Sizes(
        vision=_vit(768, 3072, 12, 12) | {"patch_size": 16},
        text=_vit(960, 2560, 32, 15) | {"num_key_value_heads": 5},
        image=512,
        layers=16,
    ),
    "reduced": Sizes(
        vision=_vit(384, 1536, 6, 6) | {"patch_size": 16},
        text=_vit(480, 1280, 8, 15) | {"num_key_value_heads": 5},
        image=256,
        layers=8,
    ),
}  # fmt: skip
PI05: dict[Size, Sizes] = {
    "real": Sizes(
        vision=_vit(1152, 4304, 27, 16),
        text={"width": 2048, "depth": 18, "mlp_dim": 16_384, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256},
        expert={"width": 1024, "depth": 18, "mlp_dim": 4096, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256},
        image=224,
    ),
    "reduced": Sizes(
        vision=_vit(384, 1536, 6, 6),
        text={"width": 512, "depth": 6, "mlp_dim": 4096, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64},
        expert={"width": 256, "depth": 6, "mlp_dim": 1024, "num_heads": 8, "num_kv_heads": 1, "head_dim": 64},
        image=224,
    ),
}


class Critic(nn.Module):
    """A small random critic Q(features, chunk): what a trained one costs, not what it knows."""

    def __init__(self, features: int, chunk: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features + chunk, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1)
        )

    def forward(self, features: Tensor, chunk: Tensor) -> Tensor:
        """Return the value (B, 1) of chunks (B, H, A) at features (B, F)."""
        value: Tensor = self.net(torch.cat([features, chunk.flatten(1)], dim=1))
        return value


@dataclass(frozen=True)
class CriticGradient:
    """Guidance by a critic: v + scale * dQ/da at the chunk that v leads to, a = x + (1 - t) v (QGF, arXiv 2606.11087).

    The velocity counts as a constant there (the identity Jacobian), so nothing is differentiated but the critic.
    """

    critic: Critic
    policy: LeRobotPolicy
    scale: float = 0.1

    def __call__(self, x: Tensor, t: Tensor, v: Tensor, context: SteeringContext) -> Tensor:
        """Return the guided velocity."""
        with torch.enable_grad():
            chunk = (x + (1.0 - t)[:, None, None] * v).detach().requires_grad_(True)
            value = self.critic(self.policy.features(context.features), chunk).sum()
            (gradient,) = torch.autograd.grad(value, chunk)
        return v + self.scale * gradient


class Stopwatch:
    """A base policy whose prefix and steps are timed apart."""

    def __init__(self, policy: LeRobotPolicy) -> None:
        self._policy = policy
        self.action_spec, self.device, self.features = policy.action_spec, policy.device, policy.features
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self.prefix_seconds = self.step_seconds = 0.0
        self.prefixes = self.steps = 0

    def encode(self, observation: Any) -> Any:
        """Compute the prefix."""
        began = _now(self.device)
        context = self._policy.encode(observation)
        self.prefix_seconds += _now(self.device) - began
        self.prefixes += 1
        return context

    def velocity(self, context: Any, x: Tensor, t: Tensor) -> Tensor:
        """Take a step."""
        began = _now(self.device)
        velocity = self._policy.velocity(context, x, t)
        self.step_seconds += _now(self.device) - began
        self.steps += 1
        return velocity


def make_smolvla(size: Size, device: str) -> LeRobotPolicy:
    """Build SmolVLA with random weights."""
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    sizes = SMOLVLA[size]
    marks = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    words = _tokenizer(["<unk>", "<pad>", *marks.values(), "<bos>"], extra_special_tokens=marks)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        SmolVLMProcessor(SmolVLMImageProcessor(), words, SmolVLMVideoProcessor()).save_pretrained(folder)
        SmolVLMConfig(
            vision_config={**sizes.vision, "image_size": sizes.image},
            text_config={
                **sizes.text, "model_type": "llama", "vocab_size": 49_280, "head_dim": 64, "pad_token_id": 1, "bos_token_id": 6,
                "eos_token_id": 5,
            },
            image_token_id=3, scale_factor=4, pad_token_id=1,
        ).save_pretrained(folder)  # fmt: skip
        config = SmolVLAConfig(
            vlm_model_name=folder, load_vlm_weights=False, num_vlm_layers=sizes.layers, device=device,
            pad_language_to="max_length", resize_imgs_with_padding=(sizes.image, sizes.image), **_features(sizes.image),
        )  # fmt: skip
        policy = SmolVLAPolicy(config)
    return _finish(policy.to(device), words)


def make_pi05(size: Size, device: str, dtype: str) -> LeRobotPolicy:
    """Build pi0.5 with random weights, on the device itself."""
    sizes = PI05[size]
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    module = importlib.import_module("lerobot.policies.pi05.modeling_pi05")
    config = PI05Config(
        device=device, dtype=dtype, image_resolution=(sizes.image, sizes.image), **_features(sizes.image)
    )
    with _pi_sizes(module, sizes), torch.device(device):
        policy = module.PI05Policy(config)
    return _finish(policy, _tokenizer(["<pad>", "<bos>", "<unk>"]))


@contextlib.contextmanager
def _pi_sizes(module: Any, sizes: Sizes) -> Iterator[None]:
    """Build pi0.5 in these sizes; LeRobot fixes its own in code, and they are what "real" says."""
    backbone = module.PaliGemmaForConditionalGenerationWithPiGemma

    def variant(name: str) -> Any:
        return module.GemmaConfig(**(sizes.text if name == "gemma_2b" else sizes.expert))

    def resized(config: Any) -> Any:
        for name, value in sizes.vision.items():
            setattr(config.vision_config, name, value)
        config.projection_dim = config.hidden_size = config.vision_config.projection_dim = sizes.text["width"]
        return backbone(config=config)

    with (
        mock.patch.object(module, "get_gemma_config", variant),
        mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", resized),
    ):
        yield


def _features(image: int) -> dict[str, Any]:
    from lerobot.configs.types import FeatureType, PolicyFeature

    cameras = {name: PolicyFeature(FeatureType.VISUAL, (3, image, image)) for name in CAMERAS}
    return {
        "input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,)), **cameras},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
    }


def _tokenizer(leading: list[str], **special: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys([*leading, *TASK.split(), *(str(number) for number in range(256))]))
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", **special)


def _finish(policy: Any, words: Any) -> LeRobotPolicy:
    """Give a policy its own processors, with a tokenizer made here in the place of one from a hub."""
    from lerobot.policies.factory import make_pre_post_processors

    local = mock.Mock(from_pretrained=lambda *_, **__: words)
    ones = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    stats = {
        name: {entry: torch.full((size,), value) for entry, value in ones.items()}
        for name, size in (("observation.state", STATE), ("action", ACTION))
    }
    with mock.patch("lerobot.processor.tokenizer_processor.AutoTokenizer", local):
        processors = make_pre_post_processors(policy.config, dataset_stats=stats)
    return LeRobotPolicy(policy, *processors)


def measure(kind: Kind, arguments: Arguments, console: Console) -> dict[str, Any]:
    """Build a network and measure every way of steering it."""
    device = arguments.device
    size: Size = arguments.size or ("real" if device.startswith("cuda") else "reduced")
    dtype = arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    compiled = device.startswith("cuda") if arguments.compiled is None else arguments.compiled
    torch.manual_seed(0)
    policy = make_smolvla(size, device) if kind == "smolvla" else make_pi05(size, device, dtype)
    if compiled:
        policy.compile()
    parameters = sum(parameter.numel() for parameter in policy.policy.parameters())
    memory = sum(parameter.numel() * parameter.element_size() for parameter in policy.policy.parameters())
    console.print(f"{kind}, {size}: {parameters / 1e6:.0f} M parameters")
    spec, watch = policy.action_spec, Stopwatch(policy)
    image = (PI05 if kind == "pi05" else SMOLVLA)[size].image
    observation = {
        "observation.state": torch.zeros(1, STATE),
        **{name: torch.rand(1, 3, image, image) for name in CAMERAS},
        "task": [TASK],
    }
    reference = 0.3 * torch.ones(1, spec.horizon, spec.dim)
    features = policy.features(policy.encode(observation)).shape[1]
    critic = Critic(features, spec.horizon * spec.state_dim).to(device).requires_grad_(False)
    steps = arguments.steps
    ways: dict[str, tuple[SteeredPolicy, Tensor | None]] = {
        "base": (SteeredPolicy(watch, steps=steps), None),
        "frs": (SteeredPolicy(watch, start=FlowReversal(steps), steps=steps), reference),
        "rank": (SteeredPolicy(watch, edit=NearestToReference(arguments.candidates), steps=steps), reference),
        "guidance": (SteeredPolicy(watch, guidance=CriticGradient(critic, policy), steps=steps), None),
    }
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(arguments.repeats + 1):  # the first warms up
        for name, (steered, hint) in ways.items():
            found = _measure_one(lambda steered=steered, hint=hint: steered.act(observation, hint, rng=0), watch)  # type: ignore[misc]
            if turn and (name not in rows or found["milliseconds"] < rows[name]["milliseconds"]):
                rows[name] = found
    for name, row in rows.items():
        console.print(f"  {name}: {row}")
    return {
        "size": size,
        "dtype": dtype if kind == "pi05" else "float32",
        "compiled": compiled,
        "parameters": parameters,
        "weights_bytes": memory,
        "image": image,
        "cameras": len(CAMERAS),
        "horizon": spec.horizon,
        "state_dim": spec.state_dim,
        "ways": rows,
    }


def _measure_one(decide: Callable[[], Any], watch: Stopwatch) -> dict[str, Any]:
    """Time one decision."""
    gc.collect()
    _forget_peak(watch.device)
    watch.clear()
    began = _now(watch.device)
    decide()
    return {
        "milliseconds": round(1e3 * (_now(watch.device) - began), 2),
        "prefix_milliseconds": round(1e3 * watch.prefix_seconds, 2),
        "steps_milliseconds": round(1e3 * watch.step_seconds, 2),
        "prefixes": watch.prefixes,
        "steps": watch.steps,
        "peak_bytes": _peak(watch.device),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _forget_peak(device: torch.device) -> None:
    """Begin to look for a new peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux; elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int | None:
    """Return the largest use of memory since then: of the GPU, or of this process; None where the system doesn't tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def report() -> str:
    """Return the tables of all results that are there, as Markdown."""
    titles = {
        "base": "base",
        "frs": "FRS",
        "rank": "sample-and-rank, n = {candidates}",
        "guidance": "guidance by a critic's gradient",
    }
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        where, settings = result["machine"], result["settings"]
        about = f"{where['cores']} cores, {settings['threads']} threads, torch {where['torch']}"
        parts.append(f"**{where['device']}** ({about}), K = {settings['steps']}:\n")
        parts.append("| | a decision, ms | prefix, ms | steps, ms | prefixes | steps | peak memory |")
        parts.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for kind, found in result["kinds"].items():
            name = {"smolvla": "SmolVLA", "pi05": "pi0.5"}[kind]
            weights = f"{found['parameters'] / 1e6:,.0f} M parameters, {found['dtype']}, weights {_size(found['weights_bytes'])}"
            weights += ", compiled" if found.get("compiled") else ""
            parts.append(f"| *{name}, {found['size']} ({weights})* | | | | | | |")
            for way, row in found["ways"].items():
                title = titles[way].format(candidates=settings["candidates"])
                times = [f"{row[name]:,.0f}" for name in ("milliseconds", "prefix_milliseconds", "steps_milliseconds")]
                cells = [title, *times, str(row["prefixes"]), str(row["steps"]), _size(row["peak_bytes"])]
                parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f} GB"


def write_report() -> None:
    """Put the tables between the marks in README.md."""
    write_between(HERE / "README.md", "table", "benchmarks/vla_latency/run.py", report())


def main() -> None:
    """Measure and write."""
    arguments = tyro.cli(Arguments)
    console = Console()
    torch.set_num_threads(arguments.threads)
    if not arguments.only_report:
        began = time.perf_counter()
        kinds = {kind: measure(kind, arguments, console) for kind in arguments.kinds}
        device = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
        import lerobot
        import transformers

        settings = {
            "steps": arguments.steps,
            "candidates": arguments.candidates,
            "repeats": arguments.repeats,
            "threads": torch.get_num_threads(),
        }
        about = {
            **machine(),
            "processor": platform.machine(),
            "lerobot": lerobot.__version__,
            "transformers": transformers.__version__,
        }
        if arguments.device == "cpu":
            about["device"] = "cpu"
        write_json(
            RESULTS / f"{device}.json",
            {"machine": about, "settings": settings, "kinds": kinds, "seconds": round(time.perf_counter() - began)},
        )
    write_report()
    console.print(report())


if __name__ == "__main__":
    main()
