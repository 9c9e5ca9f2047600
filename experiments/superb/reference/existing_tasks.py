"""s3prl's values for FBANK, encoders, featurizer and the heads of PR, ASR, SF, KS, IC and SID."""

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from experiments.superb.reference import inputs
from experiments.superb.reference.inputs import FRAMES, SEEDS, WIDTH

Values = dict[str, Any]


class Logger:
    """Keeps what an expert logs."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, **_: Any) -> None:
        self.scalars[name.rpartition("/")[2]] = float(value)


def config_of(source: Path, path: str) -> Any:
    """``downstream_expert`` of a configuration file."""
    return yaml.safe_load((source / "s3prl" / "downstream" / path).read_text())["downstream_expert"]


def gradient_norms(module: nn.Module, loss: Tensor) -> np.ndarray:
    """Norm of the gradient of each parameter."""
    module.zero_grad()
    loss.backward()
    return np.array([parameter.grad.norm().item() for parameter in module.parameters() if parameter.grad is not None])


def kept(outputs: list[Tensor], module: nn.Module) -> None:
    """Append every output of ``module`` to ``outputs``."""
    module.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )


def head_values(expert: Any, labels: Sequence[Any], names: Sequence[str], split: str, frames: Any = FRAMES) -> Values:
    """Output, loss and gradient norms of a batch; files and scalars of its utterances, evaluated one by one."""
    inputs.fill(expert, SEEDS["head"])
    expert.eval()
    outputs: list[Tensor] = []
    kept(outputs, expert.model)
    utterances = inputs.features(SEEDS["features"], frames)
    loss = expert("train", utterances, labels, list(names), defaultdict(list))
    found: Values = {"output": outputs[0], "loss": loss.item(), "gradient_norms": gradient_norms(expert, loss)}
    records: Any = defaultdict(list)
    with torch.no_grad():
        for feature, label, name in zip(utterances, labels, names, strict=True):
            expert(split, [feature], [label], [name], records)
    logger = Logger()
    expert.log_records(split, records=records, logger=logger, global_step=0, batch_ids=[], total_batch_num=3)
    found["scalars"] = np.array([f"{name} {value:.9g}" for name, value in sorted(logger.scalars.items())])
    for path in sorted(Path(expert.expdir).glob(f"{split}*.*")):
        found[f"file {path.name}"] = path.read_text()
    return found


def ctc_expert(source: Path, config: str, folder: Path, slots: Path | None = None) -> Any:
    from s3prl.downstream.ctc.expert import DownstreamExpert

    settings = config_of(source, config)
    settings["text"]["vocab_file"] = str(source / "s3prl" / settings["text"]["vocab_file"])
    if slots is not None:
        settings["text"]["slots_file"] = str(slots)
    return DownstreamExpert(WIDTH, 320, settings, str(folder))


def phone_recognition(source: Path, folder: Path) -> Values:
    expert = ctc_expert(source, "ctc/libriphone.yaml", folder)
    labels = [expert.tokenizer.encode(text) for text in inputs.PHONES]
    found = head_values(expert, labels, ["p0", "p1", "p2"], "test")
    return found | {"targets": np.concatenate(labels), "symbols": np.array(expert.tokenizer._vocab_list)}


def slot_filling(source: Path, folder: Path) -> Values:
    from s3prl.downstream.ctc import metric

    (folder / "slots.txt").write_text("\n".join(("O", *inputs.SLOT_TYPES)))
    expert = ctc_expert(source, "ctc/snips.yaml", folder, folder / "slots.txt")
    tokenizer = expert.tokenizer

    def encode(text: str) -> list[int]:
        words, tags = text.split("\t")
        return tokenizer.encode(f"BOS {words} EOS\tO {tags} Intent")

    labels = [encode(text) for text in inputs.SLOT_TEXTS]
    found = head_values(expert, labels, ["s0", "s1", "s2"], "test") | {"targets": np.concatenate(labels)}
    references = [encode(text) for text in inputs.slot_utterances()]
    found["references"] = np.array([tokenizer.decode(labels) for labels in references[:5]])
    for kind in inputs.CORRUPTIONS:
        hypotheses = [
            tokenizer.decode(inputs.corrupted([label for label in labels if label > 1], kind, number))
            for number, labels in enumerate(references)
        ]
        texts = (hypotheses, [tokenizer.decode(labels) for labels in references])
        for name in ("slot_type_f1", "slot_value_cer", "slot_value_wer", "slot_edit_f1_full", "slot_edit_f1_part"):
            percent = 1 if "edit" in name else 100
            found[f"{kind} {name}"] = percent * getattr(metric, name)(*texts)
    (folder / "slots.txt").write_text("\n".join(("O", *inputs.SLOT_TYPES)) + "\n")
    found["classes after an empty last line"] = ctc_expert(
        source, "ctc/snips.yaml", folder, folder / "slots.txt"
    ).tokenizer.vocab_size
    return found


def speech_recognition(source: Path, folder: Path) -> Values:
    from s3prl.downstream.asr.dataset import SequenceDataset
    from s3prl.downstream.asr.expert import DownstreamExpert

    settings = config_of(source, "asr/config.yaml")
    settings["datarc"]["dict_path"] = str(source / "s3prl" / "downstream" / "asr" / "char.dict")
    expert = DownstreamExpert(WIDTH, 320, settings, str(folder))
    number, batch_size = inputs.ASR_GROUPS
    chapter = folder / "1" / "2"
    chapter.mkdir(parents=True)
    texts = [*inputs.LETTERS, *["A"] * (number - len(inputs.LETTERS))]
    lines = [f"1-2-{index:04d} {text}\n" for index, text in enumerate(texts)]
    (chapter / "1-2.trans.txt").write_text("".join(lines))
    rows = [f"1/2/1-2-{index:04d}.flac,{5000 + index}\n" for index in range(number)]
    (folder / "train.csv").write_text("file_path,length\n" + "".join(rows))
    data = SequenceDataset("train", batch_size, expert.dictionary, str(folder), str(folder), train=["train"])
    names = [f"1-2-{index:04d}" for index in range(len(inputs.LETTERS))]
    labels = [data.Y[name].numpy() for name in names]
    found = head_values(expert, labels, names, "test-clean")
    path = torch.nn.functional.one_hot(torch.tensor([inputs.ASR_PATH]), len(expert.dictionary)).float()
    return found | {
        "targets": np.concatenate(labels),
        "symbols": np.array(expert.dictionary.symbols),
        "group sizes": np.array([len(group) for group in data.X]),
        "group numbers": np.array([int(name[-9:-5]) for group in data.X for name in group]),
        "decoded path": " ".join(expert._decode(path, [len(inputs.ASR_PATH)])[1][0]),
    }


def keyword_spotting(source: Path, folder: Path) -> Values:
    from s3prl.downstream.speech_commands import dataset
    from s3prl.downstream.speech_commands.expert import CLASSES, DownstreamExpert

    for name in ("train/_background_noise_/x", *(f"test/{name}" for name in inputs.KEYWORDS)):
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    settings = config_of(source, "speech_commands/config.yaml")
    settings["datarc"] |= {"speech_commands_root": folder / "train", "speech_commands_test_root": folder / "test"}
    expert = DownstreamExpert(WIDTH, settings, str(folder))
    dataset.apply_effects_file = lambda *_: (torch.zeros(1, 16_000), 16_000)
    items = sorted((expert.test_dataset[index] for index in range(3)), key=lambda item: item[1])
    found = head_values(expert, [item[1] for item in items], [item[2] for item in items], "test")
    return found | {"classes": np.array(CLASSES)}


def intent_classification(source: Path, folder: Path) -> Values:
    from s3prl.downstream.fluent_commands import dataset
    from s3prl.downstream.fluent_commands.expert import DownstreamExpert

    lines = [f"wavs/speakers/s/i{index}.wav,{','.join(intent)}\n" for index, intent in enumerate(inputs.INTENTS)]
    (folder / "data").mkdir()
    for split in ("train", "valid", "test"):
        (folder / "data" / f"{split}_data.csv").write_text("path,action,object,location\n" + "".join(lines))
    settings = config_of(source, "fluent_commands/config.yaml")
    settings["datarc"]["file_path"] = str(folder)
    expert = DownstreamExpert(WIDTH, settings, str(folder))
    dataset.torchaudio.load = lambda *_: (torch.zeros(1, 16_000), 16_000)
    items = [expert.test_dataset[index] for index in range(3)]
    labels = [item[1] for item in items]
    return head_values(expert, labels, [item[2] for item in items], "test") | {"targets": np.stack(labels)}


def speaker_identification(source: Path, folder: Path) -> Values:
    from s3prl.downstream.voxceleb1 import dataset
    from s3prl.downstream.voxceleb1.expert import DownstreamExpert

    dataset.CACHE_PATH = str(folder / "cache")
    for name in inputs.SPEAKERS:
        path = folder / "dev" / "wav" / f"{name}.wav"
        path.parent.mkdir(parents=True)
        path.touch()
    lines = [f"{split} {name}.wav\n" for split in (1, 2, 3) for name in inputs.SPEAKERS]
    (folder / "split.txt").write_text("".join(lines))
    settings = config_of(source, "voxceleb1/config.yaml")
    settings["datarc"] |= {"file_path": str(folder), "meta_data": str(folder / "split.txt")}
    expert = DownstreamExpert(WIDTH, settings, str(folder))
    dataset.torchaudio.load = lambda *_: (torch.zeros(1, 16_000), 16_000)
    items = [expert.test_dataset[index] for index in range(3)]
    labels = [item[1] for item in items]
    found = head_values(expert, labels, [item[2] for item in items], "test")
    return found | {"targets": np.array(labels), "output": found["output"][:, ::25]}


def fbank(source: Path, folder: Path) -> Values:
    from s3prl.upstream.baseline.expert import UpstreamExpert

    expert = UpstreamExpert(str(source / "s3prl" / "upstream" / "baseline" / "fbank.yaml"))
    states = expert(inputs.waves(SEEDS["waves"], inputs.FBANK_SAMPLES))["hidden_states"]
    # Every tenth frame of the first, all of the second.
    return {"first": states[0][0, ::10], "second": states[0][1, ::3], "shape": np.array(states[0].shape)}


def encoders(source: Path, folder: Path) -> Values:
    from s3prl.upstream.hf_hubert.expert import UpstreamExpert
    from transformers import Wav2Vec2FeatureExtractor

    found: Values = {}
    for kind in ("post_norm", "stable"):
        model = inputs.tiny_encoder(kind == "stable")
        model.save_pretrained(folder / kind)
        Wav2Vec2FeatureExtractor(do_normalize=kind == "stable").save_pretrained(folder / kind)
        expert = UpstreamExpert(str(folder / kind)).eval()
        with torch.no_grad():
            states = expert(inputs.waves(SEEDS["encoder_waves"], inputs.ENCODER_SAMPLES))["hidden_states"]
        found |= {f"{kind} {index}": state for index, state in enumerate(states)}
        found[f"{kind} weights"] = np.array(sorted(name for name, _ in model.named_parameters()))
    return found


class Layers(nn.Module):
    """An upstream of three hidden states from the formula; 50 frames for 16,050 samples."""

    def get_downsample_rates(self, key: str) -> int:
        return 320

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        return {"hidden_states": [inputs.tensor(SEEDS["layers"] + layer, 2, 50, WIDTH) for layer in range(3)]}


def featurizer(source: Path, folder: Path) -> Values:
    from s3prl.upstream.interfaces import Featurizer

    summed = Featurizer(Layers(), upstream_device="cpu")
    summed.weights.data = inputs.tensor(SEEDS["layer_weights"], 3)
    wavs = [torch.zeros(16_050), torch.zeros(10_200)]
    first, second = summed(wavs, Layers()(wavs))
    return {"first": first, "second": second, "frames": np.array([len(first), len(second)])}


EXISTING = {
    "fbank": fbank,
    "encoder": encoders,
    "featurizer": featurizer,
    "pr": phone_recognition,
    "asr": speech_recognition,
    "sf": slot_filling,
    "ks": keyword_spotting,
    "ic": intent_classification,
    "sid": speaker_identification,
}


def values_of(parts: dict[str, Any], source: Path) -> dict[str, np.ndarray]:
    """The values of each part, by ``part/name``; floats in single precision."""
    found: dict[str, np.ndarray] = {}
    for part, function in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            for name, value in function(source, Path(folder)).items():
                array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
                found[f"{part}/{name}"] = array.astype(np.float32) if array.dtype.kind == "f" else array
    return found
