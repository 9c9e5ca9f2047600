"""Published layouts: the hidden states of the authors' computation, published sizes, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import HubertModel

from datamodules.errors import InputError
from lightning_modules.compact_hubert import CompactHubertModel
from lightning_modules.published.convert import model_of
from lightning_modules.published.layouts import read_published
from tests.published_files import ENTRIES, FULL, TINY, Student, Weights, lightning_file, random_weights, settings

TOLERANCE = 1e-5
SAMPLES = (12_000, 9_000)  # 37 and 27 frames, odd numbers for the student that joins two
FIELDS = {
    "DistilHuBERT": {"feat_proj_layer_norm": False, "num_hidden_layers": 2, "mask_time_prob": 0.0},
    "FitHuBERT": {"time_reduction": 2, "state_width": 6, "feature_projection": True, "attention_reuse": "none"},
    "MaskHuBERT": {"feature_projection": False, "state_width": 6, "attention_reuse": "none", "mask_time_prob": 0.05},
    "ARMHuBERT": {"feature_projection": False, "state_width": 6, "attention_reuse": "softmax", "hidden_dropout": 0.05},
    "STaRHuBERT": {"feature_projection": False, "state_width": None, "time_reduction": 1},
    "DPHuBERT": {"layer_heads": [2, 0, 1], "layer_intermediate_sizes": [10, 6, 0], "feature_scale": True},
}
layouts = pytest.mark.parametrize("layout", TINY)


def published(layout: str, weights: Weights) -> HubertModel:
    return model_of(read_published(ENTRIES[layout](TINY[layout], weights)))


def waveforms() -> Tensor:
    waveforms_BT = torch.randn(2, SAMPLES[0], generator=torch.Generator().manual_seed(1))
    waveforms_BT[1, SAMPLES[1] :] = 0
    return waveforms_BT


@torch.no_grad()
def states(model: HubertModel, waveforms_BT: Tensor, num_samples: tuple[int, ...]) -> tuple[Tensor, ...]:
    valid_BT = torch.arange(waveforms_BT.shape[1]) < torch.tensor(num_samples)[:, None]
    return model(waveforms_BT, attention_mask=valid_BT.long(), output_hidden_states=True).hidden_states


def difference(found: tuple[Tensor, ...], wanted: list[list[Tensor]]) -> float:
    """Largest difference over the valid frames; of projected states the first layer's input is not there."""
    return max(
        float((state_BFD[item, : len(own_FD)] - own_FD).abs().max())
        for item, owns in enumerate(wanted)
        for state_BFD, own_FD in zip(found, owns[len(owns) - len(found) :], strict=True)
    )


@layouts
def test_states_are_those_of_the_published_computation(layout: str) -> None:
    student, weights = TINY[layout], TINY[layout].weights(random_weights())
    model, waveforms_BT = published(layout, weights), waveforms()
    assert type(model) is (HubertModel if layout == "DistilHuBERT" else CompactHubertModel)
    assert {name: getattr(model.config, name) for name in FIELDS[layout]} == FIELDS[layout]
    for items in (1, 2):
        batch_BT, num_samples = waveforms_BT[:items], SAMPLES[:items]
        found = states(model, batch_BT, num_samples)
        assert len(found) == len(student.heads) + (student.state_width is None)
        assert difference(found, student.states(weights, batch_BT, num_samples)) < TOLERANCE


@layouts
def test_control_every_weight_changes_the_states(layout: str) -> None:
    weights, waveforms_BT = TINY[layout].weights(random_weights()), waveforms()[:1, :4000]
    model = published(layout, weights)
    wanted = states(model, waveforms_BT, (4000,))
    for name, parameter in model.named_parameters():
        if (
            name == "masked_spec_embed" or ".k_proj.bias" in name
        ):  # a softmax does not see what all scores have in common
            continue
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
        found = states(model, waveforms_BT, (4000,))
        assert max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True)) > TOLERANCE, name
        parameter.data.copy_(before)


def test_control_without_the_second_softmax_the_states_are_others() -> None:
    student, weights = TINY["ARMHuBERT"], TINY["ARMHuBERT"].weights(random_weights())
    own = read_published(lightning_file(student, weights))
    once = model_of(own._replace(fields=own.fields | {"attention_reuse": "map"}))
    assert difference(states(once, waveforms(), SAMPLES), student.states(weights, waveforms(), SAMPLES)) > 1e-2


PUBLISHED = {
    "DistilHuBERT": 23_491_200,
    "MaskHuBERT": 26_635_840,
    "ARMHuBERT": 26_448_448,
    "ARMHuBERT-S": 22_394_080,
}
"""Those of FitHuBERT are below."""


def of_full_size(name: str) -> HubertModel:
    layout = name.removesuffix("-S")
    with torch.device("meta"):
        return model_of(read_published(ENTRIES[layout](FULL[name], FULL[name].weights(torch.empty))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name: str) -> None:
    model = of_full_size(name)
    assert model.num_parameters() == PUBLISHED[name]
    assert model.config.num_attention_heads == 12


def test_published_number_of_fithubert_has_the_last_head_and_the_unused_convolution() -> None:
    counts = {name: weight.numel() for name, weight in FULL["FitHuBERT"].weights(torch.empty).items()}
    heads = [sum(counts[name] for name in counts if name.startswith(f"proj_head.{layer}.")) for layer in range(12)]
    unused = sum(counts[name] for name in counts if name.startswith("upsampler."))
    encoder = sum(counts.values()) - sum(heads) - unused
    assert (encoder, unused, heads) == (21_200_096, 461_280, [830_688] * 12)
    assert encoder + unused + heads[-1] == 22_492_064
    assert of_full_size("FitHuBERT").num_parameters() == encoder + sum(heads) == 31_168_352


def test_a_pruned_student_keeps_every_parameter_of_its_file() -> None:
    weights = TINY["DPHuBERT"].weights(random_weights())
    assert published("DPHuBERT", weights).num_parameters() == sum(value.numel() for value in weights.values())


@layouts
def test_says_what_is_left_out_and_whose_student_it_is(layout: str) -> None:
    found = read_published(ENTRIES[layout](TINY[layout], TINY[layout].weights(random_weights())))
    left_out = {"DistilHuBERT": ["output_layer"], "FitHuBERT": ["upsampler"], "DPHuBERT": ["distill_linear_projs"]}
    assert [part.split(" (")[0] for part in found.left_out] == left_out.get(layout, [])
    assert found.teacher == {"DistilHuBERT": "hubert_base", "DPHuBERT": "unknown"}.get(layout, "hubert_base_ls960.pt")
    assert (found.layout, found.assumed, found.normalize) == (layout, [], False)


@pytest.mark.parametrize("layout", ["DistilHuBERT", "FitHuBERT", "ARMHuBERT"])
def test_without_settings_the_published_ones_are_assumed(layout: str) -> None:
    """The tiny students have 2 heads, so that 12 are wrong; settings beside the file give them."""
    student, weights = FULL[layout], FULL[layout].weights(torch.empty)
    with torch.device("meta"):
        entries = ENTRIES[layout](student, weights)
        own = read_published(entries)
        entries.pop("Config", None)
        entries.pop("hyper_parameters", None)
        bare = read_published(entries)
        given = read_published(entries, settings(student) | {"encoder_attention_heads": 6})
    assert bare.assumed == ["12 attention heads", f"strides {own.fields['conv_stride']}"]
    del own.fields["hidden_dropout"]
    assert bare.fields == own.fields
    assert (given.fields["num_attention_heads"], given.assumed) == (6, [])


def replaced(layout: str, change: Callable[[Weights], Any], **more: Any) -> dict[str, Any]:
    """Entries of a tiny file whose weights were changed; ``more`` goes into its settings."""
    student = TINY[layout]
    weights = student.weights(random_weights())
    change(weights)
    entries = ENTRIES[layout](student, weights)
    own = {"DistilHuBERT": lambda: entries["Config"]["distiller"], "DPHuBERT": lambda: entries["config"]}
    own.get(layout, lambda: entries["hyper_parameters"]["cfg"]["distiller"])().update(more)
    return entries


def unchanged(weights: Weights) -> None:
    """Leave the weights as they are."""


def as_after_disabling_heads(weights: Weights) -> None:
    for name in [name for name in weights if name.startswith("proj_head.")]:
        value = weights.pop(name)
        if name.startswith("proj_head.3."):
            weights[name.replace("proj_head.3", "final_proj")] = value


def with_a_later_reduction(weights: Weights) -> None:
    weights["encoder.layers.5.weight"] = weights.pop("encoder.layers.0.weight")
    del weights["encoder.layers.0.bias"]


def with_a_linear_reduction(weights: Weights) -> None:
    weights["encoder.layers.0.weight"] = torch.zeros(8, 16)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "missing weight": (
        lambda: replaced("DistilHuBERT", lambda weights: weights.pop("encoder.layers.1.fc2.bias")),
        r"it lacks encoder\.layers\.1\.feed_forward\.output_dense\.bias$",
    ),
    "missing weight that gives a size": (
        lambda: replaced("DistilHuBERT", lambda weights: weights.pop("encoder.pos_conv.0.weight_v")),
        r"it lacks the weight encoder\.pos_conv\.0\.weight_v$",
    ),
    "left over": (
        lambda: replaced("MaskHuBERT", lambda weights: weights.update({"proj_head.9.lin_proj.bias": torch.zeros(2)})),
        r"no part of the model has encoder\.layers\.9\.state_projection\.bias$",
    ),
    "no such name": (
        lambda: replaced("DistilHuBERT", lambda weights: weights.update({"task_embedding.weight": torch.zeros(2)})),
        r"this layout has no place for task_embedding\.weight$",
    ),
    "wrong shape": (
        lambda: replaced("DPHuBERT", unchanged, encoder_num_heads=[2, 0, 2]),
        r"of the wrong shape: encoder\.layers\.2\.attention\.k_proj\.weight has \[4, 8\], not \[8, 8\], .* and 4 more$",
    ),
    "last head alone": (
        lambda: replaced("FitHuBERT", as_after_disabling_heads),
        r"only the head of its last layer is left \(final_proj\).*convert the file that the training wrote",
    ),
    "later reduction": (
        lambda: replaced("FitHuBERT", with_a_later_reduction),
        r"its time reduction is encoder\.layers\.5\.weight of shape \[8, 8, 2\].*only a convolution before the first",
    ),
    "linear reduction": (
        lambda: replaced("FitHuBERT", with_a_linear_reduction),
        r"its time reduction is encoder\.layers\.0\.weight of shape \[8, 16\]",
    ),
    "padded to a multiple": (
        lambda: replaced("FitHuBERT", unchanged, required_seq_len_multiple=2),
        r"its settings have required_seq_len_multiple=2, but this project computes 1$",
    ),
    "other reuse": (
        lambda: replaced(
            "MaskHuBERT",
            lambda weights: [weights.pop(name) for name in [*weights] if "layers.3.self_attn.q_proj" in name],
        ),
        r"layers \[3\] have no queries \(reuse_pattern\)",
    ),
    "norm first": (
        lambda: replaced("ARMHuBERT", unchanged, layer_norm_first=True),
        r"its settings have layer_norm_first=True, but this project computes False$",
    ),
    "settings of another student": (
        lambda: replaced("ARMHuBERT", unchanged, encoder_ffn_embed_dim=816),
        r"its settings have encoder_ffn_embed_dim=816, but its weights have 10$",
    ),
    "convolutions of another student": (
        lambda: replaced("ARMHuBERT", unchanged, conv_feature_layers="[(4, 10, 5)] + [(5, 1, 1)] * 8"),
        r"its settings have the convolutions \[\(4, 10, 5\)\].*its weights have \(channels, kernel\) \[\(4, 10",
    ),
    "wrong heads": (
        lambda: replaced("ARMHuBERT", unchanged, encoder_attention_heads=3),
        r"its settings have encoder_attention_heads=3, which does not divide its width 8$",
    ),
    "layer norm in the convolutions": (
        lambda: replaced("DPHuBERT", unchanged, extractor_mode="layer_norm"),
        r"its settings have extractor_mode='layer_norm', but this project computes 'group_norm'$",
    ),
    "lists of other lengths": (
        lambda: replaced("DPHuBERT", unchanged, encoder_num_heads=[2, 0]),
        r"its settings have encoder_num_heads=\[2, 0\], not a number for each of 3 layers$",
    ),
    "one number for all layers": (
        lambda: replaced("DPHuBERT", unchanged, encoder_ff_interm_features=10),
        r"its settings have encoder_ff_interm_features=10, not a number for each of 3 layers$",
    ),
    "convolutions without a stride": (
        lambda: replaced("DPHuBERT", unchanged, extractor_conv_layer_config=[[4, 10]]),
        r"its settings have extractor_conv_layer_config=\[\[4, 10\]\], not a list of triples of numbers$",
    ),
    "DPWavLM": (
        lambda: replaced("DPHuBERT", unchanged, encoder_remaining_heads=[[0], [], [1]]),
        r"it is a DPWavLM, whose attention has relative positions",
    ),
    "unknown": (
        lambda: {"state_dict": {"wav2vec.weight": torch.zeros(1)}, "epoch": 3},
        r"its layout is not known\. Its first entries are state_dict, epoch; its state_dict begins with "
        r"wav2vec\.weight\. Known are DistilHuBERT of s3prl \(entries Distiller and Config\); FitHuBERT.*; DPHuBERT",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(entries: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_of(read_published(entries()))


def test_refuses_settings_beside_a_file_of_dphubert() -> None:
    with pytest.raises(InputError, match="has its own settings: leave out --config"):
        read_published(replaced("DPHuBERT", unchanged), {"encoder_layers": 3})


@pytest.mark.parametrize("missing", ["encoder_head_dim", "encoder_use_attention", "normalize_waveform"])
def test_names_a_setting_that_dphubert_lacks(missing: str) -> None:
    entries = replaced("DPHuBERT", unchanged)
    del entries["config"][missing]
    message = "its layout is not known" if missing == "encoder_use_attention" else f"its settings lack {missing}$"
    with pytest.raises(InputError, match=message):
        read_published(entries)


def test_the_head_of_training_of_starhubert_is_left_out() -> None:
    weights = TINY["STaRHuBERT"].weights(random_weights())
    head = {"final_proj.weight": torch.zeros(3, 8), "final_proj.bias": torch.zeros(3)}
    found = read_published(lightning_file(TINY["STaRHuBERT"], weights | head))
    assert found.left_out == ["final_proj (a head for training only)"]
    assert model_of(found).num_parameters() == sum(value.numel() for value in weights.values())


def test_weights_in_half_precision_become_float32() -> None:
    student = TINY["MaskHuBERT"]
    weights = {name: value.half() for name, value in student.weights(random_weights()).items()}
    assert {value.dtype for value in published("MaskHuBERT", weights).state_dict().values()} == {torch.float32}


def test_sizes_of_the_helpers_are_the_published_ones() -> None:
    """The authors' lists of convolutions, as their YAML files have them."""
    student: Student = FULL["ARMHuBERT"]
    assert student.convs == (
        [(128, 10, 5)] + [(256, 1, 1)] + [(256, 3, 2)] * 4 + [(480, 1, 1)] + [(480, 2, 2)] * 2
    )  # fmt: skip
