"""Students of every kind: values, growth, gradients, export, and what each refuses."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import HubertModel

from experiments.deployment.macs import superb_gmacs
from experiments.training.fit import CONFIGS
from lightning_modules import dropout
from lightning_modules.architectures import build_model
from lightning_modules.compact_hubert import CompactHubertModel, ReusingAttention
from lightning_modules.distillation import DistillationModule
from lightning_modules.export import export_student, load_student
from lightning_modules.growth.policies import POLICIES, make_plan
from lightning_modules.hidden_states import encoder_states
from lightning_modules.objective import ObjectiveConfig
from lightning_modules.student import Student
from lightning_modules.student_config import StudentConfig, hubert_config
from lightning_modules.superb.upstream import load_upstream
from lightning_modules.teacher import HuggingFaceTeacher
from tests.conftest import REPOSITORY
from tests.helpers import POLICY_STAGES, make_data, make_module, make_stacking, make_trainer
from tests.lightning_modules.graphs import TORCH_WARNINGS
from tests.lightning_modules.teachers import FAMILIES, save_model
from tests.students import KINDS, PAIR_STAGES, THIN, save_home

LENGTHS = [400, 1100, 4000, 5123]  # 1, 3, 12 and 15 frames


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_home(tmp_path_factory.mktemp("home"))


def stages_of(kind: str, policy: str) -> list[int]:
    return PAIR_STAGES[policy] if kind == "reused maps" else POLICY_STAGES[policy]


def without_norm_over_time(student: Student) -> Student:
    """The first convolution's norm sees padding, in every HuBERT."""
    student.hubert.feature_extractor.conv_layers[0].layer_norm = torch.nn.Identity()
    return student.eval()


def student_of(home: Path, kind: str, num_layers: int = 4, **settings: Any) -> Student:
    return make_module(home / "teacher", num_layers, **(KINDS[kind] | settings)).student.eval()


@torch.no_grad()
def shaken(student: Student) -> Student:
    """Every parameter moved, so that biases, norms and clones are not at their initial values."""
    generator = torch.Generator().manual_seed(5)
    for parameter in student.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_have_the_teachers_frames(kind: str, home: Path) -> None:
    module = make_module(home / "teacher", 4, **KINDS[kind])
    frames = module.teacher.num_frames(torch.tensor(LENGTHS)).tolist()
    for length, expected in zip(LENGTHS, frames, strict=True):
        assert [tuple(state.shape) for state in module.student(torch.randn(2, length))] == [(2, expected, 16)] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_of_a_padded_batch_is_that_item_alone(kind: str, home: Path) -> None:
    student = without_norm_over_time(shaken(student_of(home, kind)))
    waveforms_BT, num_samples_B = torch.randn(4, max(LENGTHS)), torch.tensor(LENGTHS)
    together = student(waveforms_BT, num_samples_B)
    for item, length in enumerate(LENGTHS):
        for state_BFD, own_BFD in zip(together, student(waveforms_BT[item : item + 1, :length]), strict=True):
            frames = own_BFD.shape[1]
            torch.testing.assert_close(state_BFD[item, :frames], own_BFD[0], atol=2e-5, rtol=1e-5)
    unmasked = student(waveforms_BT)  # control: what follows an item's end does matter without lengths
    assert (unmasked[-1][1, :3] - together[-1][1, :3]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_the_one_with_cheap_dropout(kind: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers finds out once for a class whether its kernel can be chosen, and a subclass inherits the answer.
    for model in (HubertModel, CompactHubertModel):
        monkeypatch.delattr(model, "_can_set_attn_implementation_cached_value", raising=False)
    assert student_of(home, kind).hubert.config._attn_implementation == dropout.ATTENTION


@pytest.mark.parametrize("kind", KINDS)
def test_known_features_take_the_place_of_waveforms(kind: str, home: Path) -> None:
    student, waveforms_BT = shaken(student_of(home, kind)), torch.randn(2, 5123)
    features_BFC = student.features(waveforms_BT)
    assert torch.equal(student(None, None, features_BFC)[-1], student(waveforms_BT)[-1])
    assert not torch.equal(student(None, None, 1.1 * features_BFC)[-1], student(waveforms_BT)[-1])


COMPILED = [pytest.param(k, marks=() if k == "reused maps" else pytest.mark.slow) for k in KINDS]


@pytest.mark.ci
@pytest.mark.filterwarnings(*[mark.args[0] for mark in TORCH_WARNINGS])
@pytest.mark.parametrize("kind", COMPILED)  # test_student_compile.py has HuBERT's layers; the fast kind differs most
def test_a_compiled_student_is_the_eager_one_through_a_growth(kind: str, home: Path) -> None:
    eager = student_of(home, kind, 2)
    compiled = student_of(home, kind, 2, compile=True, compile_backend="aot_eager")
    for plan in ([0, 1], [0, 1, 0, 1]):
        for student in (eager, compiled):
            student.grow(plan)
        shaken(eager)
        compiled.load_state_dict(eager.state_dict())
        for samples in (4000, 5123):
            waveforms_BT, num_samples_B = torch.randn(2, samples), torch.tensor([samples, 3000])
            pairs = zip(compiled(waveforms_BT, num_samples_B), eager(waveforms_BT, num_samples_B), strict=True)
            for own_BFD, expected_BFD in pairs:
                torch.testing.assert_close(own_BFD, expected_BFD, atol=1e-5, rtol=1e-5)
    layers: Any = compiled.hubert.encoder.layers
    assert all(layer._compiled_call_impl is not None for layer in layers)


def test_a_layer_that_reuses_a_map_multiplies_its_values_with_it(home: Path) -> None:
    student = shaken(student_of(home, "reused maps"))
    layers: Any = student.hubert.encoder.layers
    assert [type(layer.attention) is ReusingAttention for layer in layers] == [False, True, False, True]
    hidden_BFD = torch.randn(1, 5, 16)
    given, reusing = layers[0].attention, layers[1].attention
    _, map_BHFF = given(hidden_BFD)
    expected = torch.zeros(5, 16)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        query, key = (project(hidden_BFD[0])[:, part] for project in (given.q_proj, given.k_proj))
        weights = torch.softmax(query @ key.T / 8**0.5, dim=-1)
        torch.testing.assert_close(map_BHFF[0, head], weights)
        expected[:, part] = weights @ reusing.v_proj(hidden_BFD[0])[:, part]
    torch.testing.assert_close(reusing(hidden_BFD, None, map_BHFF)[0][0], reusing.out_proj(expected))
    reusing.second_softmax = True
    again = torch.cat(
        [torch.softmax(map_BHFF[0, h], -1) @ reusing.v_proj(hidden_BFD[0])[:, 8 * h : 8 * h + 8] for h in (0, 1)], 1
    )
    torch.testing.assert_close(reusing(hidden_BFD, None, map_BHFF)[0][0], reusing.out_proj(again))


def test_joined_frames_and_their_states_by_hand(home: Path) -> None:
    """Of 5 frames: three joined ones, the last of a frame and zeros, and states of five frames again."""
    student = shaken(student_of(home, "joined frames", 1))
    encoder, hidden_BFD = student.hubert.encoder, torch.randn(1, 5, 16)
    layer: Any = encoder.layers[0]
    padded_FD = torch.cat([hidden_BFD[0], torch.zeros(1, 16)])
    joined_FD = torch.stack(
        [sum(padded_FD[2 * f + k] @ encoder.reduce.weight[:, :, k].T for k in (0, 1)) for f in range(3)]
    )
    output_FD = layer((joined_FD + encoder.reduce.bias)[None])[0][0]
    restored_FD = torch.stack([output_FD[f // 2] @ layer.restore.weight[:, :, f % 2] for f in range(5)])
    (state_BFD,) = encoder.layer_states(hidden_BFD, None)
    torch.testing.assert_close(state_BFD[0], restored_FD + layer.restore.bias, atol=1e-5, rtol=1e-5)


def test_the_first_layers_are_the_teachers(home: Path) -> None:
    module = make_module(home / "teacher", 4, **KINDS["first layers"])
    own, theirs = module.student.hubert.state_dict(), module.teacher.model.state_dict()
    equal = {name for name in own if name in theirs and torch.equal(own[name], theirs[name])}
    copied = ("encoder.layers.0.", "encoder.layers.1.", "encoder.pos_conv_embed.", "feature_projection.")
    assert {name for name in own if name.startswith(copied)} <= equal
    matrices = {name for name in own if name.startswith("encoder.layers.2.") and own[name].ndim == 2}
    assert matrices
    assert not matrices & equal  # control: the third layer is drawn
    assert not module.student.hubert.feature_projection.feat_proj_layer_norm


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(student: Student, losses: list[int]) -> dict[str, Tensor]:
    """Gradients of the sum of the squares of some hidden states."""
    student.zero_grad()
    states = student(torch.randn(1, 4000, generator=torch.Generator().manual_seed(1)))
    torch.stack([states[place].square().sum() for place in losses]).sum().backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_the_front_ends_gradient_is_scaled_and_no_other(home: Path) -> None:
    student = student_of(home, "first layers")
    scaled = gradients(student, [4])
    student.config.front_end_gradient = 1.0
    for name, whole in gradients(student, [4]).items():
        factor = 0.1 if "feature_extractor" in name else 1.0
        torch.testing.assert_close(scaled[name], factor * whole, atol=1e-6, rtol=1e-4)


def test_each_layers_gradient_is_shared_with_the_layers_above(home: Path) -> None:
    """With N = 4, a loss at layer i (from 0) reaches layer i with m (1 - m), and each layer below takes its m more."""
    student = student_of(home, "reused maps")
    factors = [(4 - i) / (5 - i) for i in range(4)]
    for place in range(4):
        student.config.scale_layer_gradients = True
        scaled = gradients(student, [place + 1])
        student.config.scale_layer_gradients = False
        plain = gradients(student, [place + 1])
        expected = factors[place] * (1 - factors[place])
        for layer in range(place, -1, -1):
            expected *= factors[layer] if layer < place else 1.0
            name = f"hubert.encoder.layers.{layer}.feed_forward.output_dense.weight"
            torch.testing.assert_close(scaled[name], expected * plain[name], atol=1e-5, rtol=1e-4)


# -- growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_of_pairs_is_the_policys_plan_of_their_number(policy: str) -> None:
    for depth, target in zip(PAIR_STAGES[policy], PAIR_STAGES[policy][1:], strict=False):
        plan, pairs = make_plan(policy, depth, target, group=2), make_plan(policy, depth // 2, target // 2)
        assert len(plan) == target
        assert [source if source is None else source // 2 for source in plan[::2]] == pairs
        assert plan[1::2] == [source if source is None else source + 1 for source in plan[::2]]


@pytest.mark.parametrize(
    ("depth", "target", "message"),
    [
        (3, 6, "cannot grow 3 -> 6 layers, since .*groups of 2.*multiples of 2"),
        (4, 7, "cannot grow 4 -> 7 layers, since .*groups of 2"),
        (4, 10, r"cannot grow 2 -> 5 layers.*\(counted in groups, since .*groups of 2"),
    ],
)
def test_plans_that_would_part_a_pair_are_refused(depth: int, target: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan("interleaved", depth, target, group=2)


def kinds_and_policies() -> Iterator[Any]:
    """All pairs; slow but for two policies, since plans are tested above and policies with HuBERT's layers."""
    for kind, policy in itertools.product([kind for kind in KINDS if kind != "hubert"], POLICIES):
        fast = policy in ("interleaved", "random")
        yield pytest.param(kind, policy, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "policy"), list(kinds_and_policies()))
def test_every_kind_grows_by_every_policy(kind: str, policy: str, home: Path, tmp_path: Path) -> None:
    stages = stages_of(kind, policy)
    objective = {"intermediate": "l2l", "layers": [4]} if kind == "reused maps" else {}
    module = make_module(home / "teacher", stages[-1], objective=objective, **KINDS[kind])
    stacking = make_stacking(policy, stages=stages)
    trainer = make_trainer(tmp_path, stacking, max_epochs=len(stages), limit_val_batches=0)
    trainer.fit(module, datamodule=make_data(home / "corpus", home / "cache", batch_size=8))
    assert [event.depth for event in stacking.events] == stages[1:]
    assert module.student.depth == stages[-1]
    if kind == "reused maps":
        layers: Any = module.student.hubert.encoder.layers
        assert [type(layer.attention) is ReusingAttention for layer in layers] == [False, True] * (stages[-1] // 2)
    student = module.student.eval()
    again = student_of(home, kind, stages[-1])
    again.load_state_dict(student.state_dict())
    waveforms_BT = torch.randn(1, 4000)
    assert torch.equal(again(waveforms_BT)[-1], student(waveforms_BT)[-1])


def test_an_odd_stage_of_pairs_is_refused_before_the_first_step(home: Path, tmp_path: Path) -> None:
    module = make_module(home / "teacher", 4, **KINDS["reused maps"])
    trainer = make_trainer(tmp_path, make_stacking(stages=[1, 2, 4]))
    with pytest.raises(ValueError, match="cannot grow 1 -> 2 layers, since the student's layers stay together"):
        trainer.fit(module, datamodule=make_data(home / "corpus", home / "cache", batch_size=8))


def test_a_pair_is_loaded_at_any_depth(home: Path) -> None:
    deep = shaken(student_of(home, "reused maps", 6))
    shallow = student_of(home, "reused maps", 2)
    shallow.load_state_dict(deep.state_dict())
    waveforms_BT = torch.randn(1, 4000)
    assert torch.equal(shallow(waveforms_BT)[-1], deep(waveforms_BT)[-1])


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_student_has_the_states_of_the_trained_one(kind: str, home: Path, tmp_path: Path) -> None:
    stages = stages_of(kind, "interleaved")
    module = make_module(home / "teacher", stages[-1], objective={"layers": [4]}, **KINDS[kind])
    trainer = make_trainer(tmp_path, make_stacking(stages=stages), max_epochs=4, limit_val_batches=0)
    trainer.fit(module, datamodule=make_data(home / "corpus", home / "cache", batch_size=8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_student(tmp_path / "last.ckpt", tmp_path / "exported")
    student, waveforms_BT = module.student.eval(), torch.randn(2, 4000)
    lengths_B = torch.tensor([4000, 3000])
    expected = student(waveforms_BT * (torch.arange(4000) < lengths_B[:, None]), lengths_B)
    for name in ("last.ckpt", "exported"):
        model = load_student(tmp_path / name).model
        heard_BT = waveforms_BT * (torch.arange(4000) < lengths_B[:, None])
        found = encoder_states(model, heard_BT, lengths_B)
        alone = model(heard_BT, attention_mask=(torch.arange(4000) < lengths_B[:, None]).long())
        assert torch.equal(alone.last_hidden_state, found[-1])  # without the other states
        upstream = load_upstream(str(tmp_path / name))([waveforms_BT[0], waveforms_BT[1, :3000]])
        for own, theirs, read in zip(expected, found, upstream, strict=True):
            for item, frames in enumerate(student.num_frames(lengths_B).tolist()):
                torch.testing.assert_close(theirs[item, :frames], own[item, :frames], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(read[item, :frames], own[item, :frames], atol=1e-5, rtol=1e-5)
    card = (tmp_path / "exported" / "README.md").read_text()
    needs_code = kind in ("joined frames", "reused maps")
    assert ("trust_remote_code=True" in card) == needs_code == (tmp_path / "exported" / "compact_hubert.py").is_file()
    assert ("tests.own_students.ScaledHubert" in card) == (kind == "own model")


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv_layers": THIN}, "conv_layers=.* but model.student.front_end_init=teacher copies"),
        ({"front_end_init": "random", "conv_layers": [[8, 3]]}, r"holds \[8, 3\]: every entry is \[channels, kernel"),
        ({"front_end_init": "random", "conv_layers": THIN, "conv_channels": 8}, "both give the channels"),
        ({"front_end_gradient": 1.5}, "front_end_gradient=1.5 must be from 0 to 1"),
        ({"input_dropout": -0.1}, "input_dropout=-0.1 must be from 0 to 1"),
        ({"time_reduction": 0}, "time_reduction=0 must be at least 1"),
        ({"init_layers": 5}, "init_layers=5 must be from 0 to"),
        ({"options": {"do_stable_layer_norm": True}, "architecture": "transformers.HubertModel"}, "leave it out"),
        ({"reuse_attention": True, "num_layers": 3}, "makes pairs of layers, but model.student.num_layers=3 is odd"),
        ({"feature_projection": False}, "have 8 channels and model.student.hidden_size=16: make them equal"),
        ({"options": {"first_share": 1.0}}, "are for an model.student.architecture of your own"),
        ({"architecture": "tests.own_students.ScaledLayer"}, "is not a subclass of transformers.HubertModel"),
        ({"architecture": "no.such.Model"}, "unknown model.student.architecture 'no.such.Model'"),
        ({"architecture": "hubert", "time_reduction": 2}, "are settings of model.student.architecture=compact_hubert"),
        ({"init_layers": 1, "hidden_size": 32}, "init_layers=1, but .* in the student and .* in the teacher"),
        ({"init_layers": 1, "num_heads": 4}, "but the teacher has 2 attention heads"),
        ({"init_layers": 1, "reuse_attention": True, "num_layers": 2}, None),
        ({"init_layers": 2, "reuse_attention": True, "num_layers": 2}, "missing in the student"),
        (
            {"kernels": "channels_last", "front_end_init": "random", "conv_layers": THIN},
            "a kernel of 1 and stride of 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str | None, home: Path) -> None:
    def build() -> DistillationModule:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_layers": 4} | settings
        return DistillationModule(
            HuggingFaceTeacher(str(home / "teacher")), StudentConfig(**sizes), ObjectiveConfig(intermediate="none")
        )

    if message is None:
        build()
        return
    with pytest.raises(ValueError, match=message):
        build()


# -- published sizes --------------------------------------------------------------------------------------------------

PUBLISHED = {
    "distilhubert": (23_491_200, 23.49, 0),
    "one_3layer": (30_579_072, 30.58, 0),
    "half_12layer": (26_872_960, 26.87, 0),
    # Of the twelve convolutions that restore the frame rate the published number has two, and it has one projection.
    "fithubert": (26_735_456, 22.49, (480 * 768 + 768) - 10 * (2 * 480 * 480 + 480)),
    "maskhubert": (22_202_944, 26.64, 12 * (480 * 768 + 768)),
    "armhubert": (22_015_552, 26.45, 12 * (480 * 768 + 768)),
    "armhubert_s": (18_403_552, 22.39, 12 * (432 * 768 + 768)),
}
"""Recipe -> parameters here, published (in millions), and what the published number has besides."""
GMACS = {"distilhubert": 785.9, "half_12layer": 859.4, "fithubert": 348.1, "armhubert": 455.5}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_have_the_published_sizes(recipe: str) -> None:
    settings = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())["model"].get("student", {})
    config = hubert_config(StudentConfig(**settings), None)
    with torch.device("meta"):
        model = build_model(config.to_dict())
    found = sum(parameter.numel() for parameter in model.parameters())
    expected, published, besides = PUBLISHED[recipe]
    assert found == expected
    assert round((found + besides) / 1e6, 2) == published
    page = (REPOSITORY / "docs" / "published.md").read_text()
    assert f"{found:,}" in page
    if recipe in GMACS:
        assert round(sum(superb_gmacs(config)), 1) == GMACS[recipe]
        assert f"| {GMACS[recipe]} |" in page


def test_layers_that_begin_with_their_norms_are_not_copied(tmp_path: Path) -> None:
    """They have the names and shapes of those that end with them."""
    teacher = HuggingFaceTeacher(str(save_model(tmp_path, FAMILIES["hubert_large"]())))
    config = teacher.model.config
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    student = StudentConfig(**sizes, num_heads=config.num_attention_heads, num_layers=2, init_layers=1)
    with pytest.raises(ValueError, match="the teacher's layers begin with their norms"):
        DistillationModule(teacher, student, ObjectiveConfig(intermediate="none"))
