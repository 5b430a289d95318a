"""Latent shapes and the actions that steer: laws, bounds, units."""

import pytest
import torch

from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.flow import denoise
from counterflow.policies import ActionSpec, FieldPolicy, FlowPolicy, NetworkConfig, Normaliser, bind
from counterflow.steering import LatentShape, SteeringSpace, describe_bound, mass_beyond, suggest_bound, to_shell

SHAPES = [LatentShape(), LatentShape("low_rank", 2), LatentShape("low_rank", 3, "zero"), LatentShape("repeated")]


def policy(**changes: object) -> FieldPolicy:
    spec = ActionSpec(**{"horizon": 4, "dim": 2, "low": (-1.0,) * 2, "high": (1.0,) * 2, **changes})
    return FieldPolicy(lambda x, t, _: -x * t[:, None, None], spec)


def test_a_basis_is_orthonormal_and_begins_with_the_constant() -> None:
    basis = LatentShape("low_rank", 4).basis(6, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.mT, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(basis[0], torch.full((6,), 6**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_expanded_is_found_again(shape: LatentShape) -> None:
    coefficients = torch.randn(3, shape.rows(5), 2)
    noise = shape.expand(coefficients, 5, torch.randn(3, 5, 2))
    assert noise.shape == (3, 5, 2)
    torch.testing.assert_close(shape.project(noise), coefficients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_which_shapes_keep_the_priors_law(shape: LatentShape) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = shape.rows(4)
    noise = shape.expand(torch.randn(40_000, rows, 1, generator=rng), 4, torch.randn(40_000, 4, 1, generator=rng))[
        ..., 0
    ]
    same = torch.allclose(noise.mT @ noise / len(noise), torch.eye(4), atol=0.03)
    assert same == shape.keeps_prior


def test_bounds_from_data() -> None:
    noises = torch.randn(2000, 4, 2, generator=torch.Generator().manual_seed(0))
    assert suggest_bound(noises, quantile=0.95) == pytest.approx(1.96, abs=0.05)
    told = describe_bound(1.0, noises=2 * noises)
    assert told["prior_cut"] == pytest.approx(0.3173, abs=1e-3)
    assert told["noises_cut"] == pytest.approx(0.617, abs=0.02)
    assert told["noises_norm"] == pytest.approx(2, abs=0.05)
    assert mass_beyond(3.0) == pytest.approx(0.0027, abs=1e-4)
    torch.testing.assert_close(to_shell(noises).flatten(1).norm(dim=1), torch.full((2000,), 8**0.5))
    with pytest.raises(InvalidInputError, match="at least one"):
        suggest_bound(noises[:0])


def test_a_latent_becomes_the_chunk_that_the_flow_makes_of_it() -> None:
    space = SteeringSpace(policy(), bound=1.5)
    actions = torch.randn(3, 8)
    made = space.decide(None, actions, torch.zeros(3, 4, 2))
    expected = denoise(bind(space.policy, None), actions.clamp(-1.5, 1.5).view(3, 4, 2), 5)
    torch.testing.assert_close(made.base, expected)
    torch.testing.assert_close(made.actions, expected.clamp(-1, 1))


def test_residuals_are_in_the_environments_units_whatever_the_normalisation() -> None:
    normaliser = Normaliser(torch.tensor([0.1, 0.0]), torch.tensor([0.5, 0.01]))
    space = SteeringSpace(
        policy(normaliser=normaliser, low=(-9.0,) * 2, high=(9.0,) * 2), "residual", residual_bound=(0.2, 0.03)
    )
    fresh = torch.randn(3, 4, 2)
    made = space.decide(None, torch.full((3, 8), 5.0), fresh)
    plain = normaliser.denormalise(made.base)
    torch.testing.assert_close(made.actions - plain, torch.tensor([0.2, 0.03]).expand(3, 4, 2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(normaliser.denormalise(made.chunk), made.actions)
    assert space.limits.tolist() == pytest.approx([0.2, 0.03] * 4)


def test_padding_and_the_past_are_nobodys() -> None:
    space = SteeringSpace(policy(padding=3, past=1, executed=2), "both", latent=LatentShape("repeated"))
    assert (space.latent_size, space.residual_size) == (2, 4)
    fresh = torch.randn(2, 4, 5)
    made = space.decide(None, torch.ones(2, 6), fresh)
    assert made.actions.shape == (2, 2, 2)
    torch.testing.assert_close(made.noise[..., 2:], fresh[..., 2:])
    assert (made.noise[..., :2] == 1).all()


def test_denoising_from_features_needs_a_policy_that_says_so() -> None:
    spec = ActionSpec(4, 2)
    flow = FlowPolicy(NetworkConfig(width=8, depth=1), Normaliser(torch.zeros(3), torch.full((3,), 2.0)), spec)
    space = SteeringSpace(flow.requires_grad_(False))
    context, inputs = space.encode(torch.ones(2, 3))
    torch.testing.assert_close(space.context_of(inputs), context)
    with pytest.raises(MismatchError, match="SAC variant"):
        SteeringSpace(policy()).context_of(inputs)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"ports": "noise"}, UnknownNameError),
        ({"bound": 0.0}, InvalidInputError),
        ({"residual_bound": (0.1, 0.1, 0.1)}, InvalidInputError),
        ({"residual_bound": -1.0}, InvalidInputError),
        ({"show_base": True}, InvalidInputError),
        ({"steps": 0}, InvalidInputError),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        SteeringSpace(policy(), **changes)
    with pytest.raises(InvalidInputError, match="8 numbers of the latent"):
        SteeringSpace(policy()).split(torch.zeros(2, 3))
    with pytest.raises(UnknownNameError):
        LatentShape("half")  # type: ignore[arg-type]
