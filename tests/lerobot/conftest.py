"""LeRobot's real classes with less than a million parameters, random weights, and without a hub.

These tests run in the environment that `make test` makes for them (Python 3.12, LeRobot 0.6), and are skipped elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

HERE = Path(__file__).parent
STATE, ACTION = 5, 4
CAMERA = "observation.images.top"
KINDS = ("smolvla", "pi0", "pi05", "multi_task_dit", "history", "rk4", "evo1")
SIZES = {"smolvla": (48, 64), "pi0": (32, 40), "pi05": (32, 40), "evo1": (28, 28)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs LeRobot where it isn't, unless this is the leg that is there for it."""
    if importlib.util.find_spec("lerobot") is not None or os.environ.get("COUNTERFLOW_LEROBOT") == "required":
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(
                pytest.mark.skip(reason="LeRobot 0.6 needs Python 3.12 and an environment of its own: make lerobot")
            )


@dataclass
class Made:
    """A small policy with its processors."""

    kind: str
    policy: Any
    preprocessor: Any
    postprocessor: Any

    def wrapped(self, **settings: Any) -> Any:
        from counterflow.policies.lerobot import LeRobotPolicy

        return LeRobotPolicy(self.policy, self.preprocessor, self.postprocessor, **settings)

    def save(self, folder: Path) -> Path:
        for part in (self.policy, self.preprocessor, self.postprocessor):
            part.save_pretrained(folder)
        return folder

    def observation(self, rows: int = 2, seed: int = 0) -> dict[str, Any]:
        """What LeRobot's datasets and environments hand to a preprocessor."""
        rng = torch.Generator().manual_seed(seed)
        height, width = SIZES.get(self.kind, (32, 32))
        seen = {"observation.state": torch.randn((rows, STATE), generator=rng)}
        if self.policy.config.image_features:
            seen[CAMERA] = torch.rand((rows, 3, height, width), generator=rng)
        tasks = ["push the cube", "push", "the red cube"]
        return {**seen, "task": [tasks[row % 3] for row in range(rows)]}

    def own_chunk(self, observation: dict[str, Any], noise: Tensor) -> Tensor:
        """What LeRobot itself executes for this noise, robot units."""
        batch = self.preprocessor(dict(observation))
        self.policy.reset()
        if self.kind in ("smolvla", "pi0", "pi05"):
            chunk = self.policy.predict_action_chunk(batch, noise=noise)
        elif self.kind == "evo1":
            with mock.patch("torch.rand", return_value=(noise.flatten(1) + 1) / 2):
                chunk = self.policy.predict_action_chunk(batch)
        else:  # takes no noise, and fills its history in select_action
            with mock.patch("torch.randn", return_value=noise):
                steps = range(self.policy.config.n_action_steps)
                chunk = torch.stack([self.policy.select_action(self.preprocessor(dict(observation))) for _ in steps], 1)
        found: Tensor = self.postprocessor(chunk)
        return found


def statistics(shape: tuple[int, ...], low: float, high: float) -> dict[str, Tensor]:
    middle = torch.linspace(low, high, shape[0])
    spread = torch.linspace(0.5, 1.5, shape[0])
    return {
        "mean": middle,
        "std": spread,
        "min": middle - spread,
        "max": middle + 2 * spread,
        "q01": middle - 0.9 * spread,
        "q99": middle + 1.8 * spread,
        "q10": middle - 0.5 * spread,
        "q90": middle + spread,
    }


STATISTICS = {
    "observation.state": statistics((STATE,), -1.0, 1.0),
    "action": statistics((ACTION,), 0.1, 0.5),
    CAMERA: {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)},
}


def tokenizer(leading: list[str], size: int, **special: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*leading, "push", "the", "red", "cube"]
    names += [f"word{index}" for index in range(size - len(names))]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", **special)


def features(height: int, width: int, camera: bool = True) -> dict[str, Any]:
    from lerobot.configs.types import FeatureType, PolicyFeature

    seen = {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))}
    if camera:
        seen[CAMERA] = PolicyFeature(FeatureType.VISUAL, (3, height, width))
    return {"input_features": seen, "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))}}


def finish(kind: str, policy: Any, stats: dict[str, Any] | None = None) -> Made:
    """Give the policy weights under which everything matters, and its processors."""
    from lerobot.policies.factory import make_pre_post_processors

    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():  # some layers begin at zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng).to(parameter))
    processors = make_pre_post_processors(policy.config, dataset_stats=STATISTICS if stats is None else stats)
    return Made(kind, policy.eval(), *processors)


def make_smolvla(folder: Path, **changes: Any) -> Made:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    names = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    words = tokenizer(["<unk>", "<pad>", *names.values(), "<bos>"], 300, extra_special_tokens=names)
    SmolVLMProcessor(SmolVLMImageProcessor(), words, SmolVLMVideoProcessor()).save_pretrained(folder)
    SmolVLMConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pad_token_id": 1,
            "bos_token_id": 6,
            "eos_token_id": 5,
        },
        image_token_id=3,
        scale_factor=2,
        pad_token_id=1,
    ).save_pretrained(folder)
    settings = {
        "num_vlm_layers": 4,
        "resize_imgs_with_padding": (64, 64),
        "chunk_size": 10,
        "n_action_steps": 8,
        "num_steps": 7,
        "tokenizer_max_length": 12,
        "pad_language_to": "max_length",
        "device": "cpu",
        **features(*SIZES["smolvla"]),
        **changes,
    }
    config = SmolVLAConfig(vlm_model_name=str(folder), load_vlm_weights=False, **settings)
    with contextlib.redirect_stdout(None):
        return finish("smolvla", SmolVLAPolicy(config))


def make_pi(kind: str, stats: dict[str, Any] | None = None, **changes: Any) -> Made:
    """pi0 or pi0.5; the fixture `small_pi` must be active."""
    configuration = importlib.import_module(f"lerobot.policies.{kind}.configuration_{kind}")
    modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    name = {"pi0": "PI0", "pi05": "PI05"}[kind]
    settings = {
        "chunk_size": 10,
        "n_action_steps": 6,
        "num_inference_steps": 4,
        "image_resolution": (28, 28),
        "tokenizer_max_length": 24,
        "dtype": "float32",
        "device": "cpu",
        **features(*SIZES[kind]),
        **changes,
    }
    return finish(kind, getattr(modeling, f"{name}Policy")(getattr(configuration, f"{name}Config")(**settings)), stats)


def make_dit(folder: Path, kind: str = "multi_task_dit", stats: dict[str, Any] | None = None, **changes: Any) -> Made:
    from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy
    from transformers import CLIPConfig, CLIPModel

    folder = folder / "clip"
    if not folder.exists():
        both = {
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 16,
        }
        text = {
            "vocab_size": 120,
            "max_position_embeddings": 16,
            "eos_token_id": 2,
            "bos_token_id": 1,
            "pad_token_id": 0,
        }
        vision = {"image_size": 32, "patch_size": 16}
        CLIPModel(CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=16)).save_pretrained(
            folder
        )
        tokenizer(["<pad>", "<s>", "</s>", "<unk>"], 120, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
        torch.manual_seed(0)
    settings = {
        "objective": "flow_matching",
        "hidden_dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "n_obs_steps": 3 if kind == "history" else 1,
        "horizon": 8,
        "n_action_steps": 5,
        "num_integration_steps": 6,
        "integration_method": "rk4" if kind == "rk4" else "euler",
        "timestep_embed_dim": 16,
        "image_crop_shape": None,
        "tokenizer_max_length": 10,
        "device": "cpu",
        **features(32, 32, changes.pop("camera", True)),
        **changes,
    }
    config = MultiTaskDiTConfig(vision_encoder_name=str(folder), text_encoder_name=str(folder), **settings)
    return finish(kind, MultiTaskDiTPolicy(config), stats)


def make_evo1(folder: Path, **changes: Any) -> Made:
    from lerobot.policies.evo1.configuration_evo1 import Evo1Config
    from lerobot.policies.evo1.modeling_evo1 import Evo1Policy
    from transformers import InternVLConfig, InternVLModel

    marks = ["<img>", "<IMG_CONTEXT>", "</img>"]
    text = {
        "model_type": "qwen2",
        "vocab_size": 300,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [14, 14],
    }
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=3, image_seq_length=1, downsample_ratio=0.5
    )
    InternVLModel(config).save_pretrained(folder)
    tokenizer(["<pad>", "<unk>", *marks], 300, additional_special_tokens=marks).save_pretrained(folder)
    settings = {
        "vlm_num_layers": 2,
        "vlm_dtype": "float32",
        "use_flash_attn": False,
        "image_resolution": (28, 28),
        "embed_dim": 24,
        "hidden_dim": 32,
        "state_hidden_dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "chunk_size": 6,
        "n_action_steps": 4,
        "num_inference_timesteps": 5,
        "max_views": 1,
        "max_action_dim": 8,
        "max_state_dim": 6,
        "device": "cpu",
        **features(*SIZES["evo1"]),
        **changes,
    }
    return finish("evo1", Evo1Policy(Evo1Config(vlm_model_name=str(folder), **settings)))


@pytest.fixture(scope="session")
def small_pi() -> Iterator[None]:
    """While it is active, pi0 and pi0.5 are the real classes with a hundred thousand parameters instead of three billion.

    LeRobot fixes their sizes (two variants of Gemma, a vocabulary of 257,152, SigLIP) in code and fetches their tokenizer.
    """
    with contextlib.ExitStack() as stack:
        words = tokenizer(["<pad>", "<bos>", "<unk>"], 300)
        local = mock.Mock(from_pretrained=lambda *_, **__: words)
        stack.enter_context(mock.patch("lerobot.processor.tokenizer_processor.AutoTokenizer", local))
        for kind in ("pi0", "pi05"):
            module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
            backbone, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

            def sizes(variant: str, module: Any = module) -> Any:
                width, inner = (32, 64) if variant == "gemma_2b" else (24, 48)
                return module.GemmaConfig(width=width, depth=2, mlp_dim=inner, num_heads=2, num_kv_heads=1, head_dim=16)

            def small_backbone(config: Any, make: Any = backbone) -> Any:
                config.text_config.vocab_size = 300
                config.projection_dim = config.hidden_size = config.vision_config.projection_dim = 32
                for name, value in {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                }.items():
                    setattr(config.vision_config, name, value)
                return make(config=config)

            def small_expert(config: Any, make: Any = expert) -> Any:
                config.vocab_size = 300
                return make(config=config)

            stack.enter_context(mock.patch.object(module, "get_gemma_config", sizes))
            stack.enter_context(
                mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_backbone)
            )
            stack.enter_context(mock.patch.object(module, "PiGemmaForCausalLM", small_expert))
        yield


@pytest.fixture(scope="session")
def make(small_pi: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Make a policy of a kind; the same arguments give the same weights."""
    folder = tmp_path_factory.mktemp("backbones")

    def made(kind: str, **changes: Any) -> Made:
        torch.manual_seed(0)
        if kind == "smolvla":
            return make_smolvla(folder / "smolvla", **changes)
        if kind in ("pi0", "pi05"):
            return make_pi(kind, **changes)
        if kind == "evo1":
            return make_evo1(folder / "evo1", **changes)
        return make_dit(folder, kind, **changes)

    return made


@pytest.fixture(scope="session")
def shared(make: Callable[..., Made]) -> Callable[[str], Made]:
    """The same, made once: for tests that change nothing."""
    kept: dict[str, Made] = {}

    def once(kind: str) -> Made:
        if kind not in kept:
            kept[kind] = make(kind)
        return kept[kind]

    return once


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, shared: Callable[[str], Made]) -> Made:
    """Each of the policies that can be steered."""
    return shared(request.param)
