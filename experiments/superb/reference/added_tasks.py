"""s3prl's values for ER, ASV, SD and QbE."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import soundfile
import torch
import yaml
from torch import Tensor, nn

from experiments.superb.reference import inputs
from experiments.superb.reference.existing_tasks import Logger, Values, config_of, gradient_norms, head_values, kept
from experiments.superb.reference.inputs import SEEDS, WIDTH


def emotion_recognition(source: Path, folder: Path) -> Values:
    from s3prl.downstream.emotion import dataset
    from s3prl.downstream.emotion.expert import DownstreamExpert

    dataset.torchaudio.load = lambda *_: (torch.zeros(1, 16_000), 16_000)
    found: Values = {}
    for fold in range(1, 6):
        settings = config_of(source, "emotion/config.yaml")
        meta_data = str(source / "s3prl" / "downstream" / "emotion" / "meta_data")
        settings["datarc"] |= {"root": "", "meta_data": meta_data, "pre_load": False, "test_fold": f"fold{fold}"}
        expert = DownstreamExpert(WIDTH, settings, str(folder))
        splits = expert.train_dataset, expert.dev_dataset
        found[f"fold{fold} sizes"] = np.array([*map(len, splits), len(expert.test_dataset)])
        for name, split in zip(("train", "dev"), splits, strict=True):
            found[f"fold{fold} {name} indices"] = np.array(split.indices[:8])
            found[f"fold{fold} {name} names"] = np.array([split[index][2] for index in range(3)])
    classes = expert.test_dataset.idx2emotion
    found["classes"] = np.array([classes[index] for index in range(4)])
    names = [expert.test_dataset[index][2] for index in range(3)]
    return found | {"names": np.array(names)} | head_values(expert, list(inputs.EMOTIONS), names, "test")


def speaker_verification(source: Path, folder: Path) -> Values:
    from s3prl.downstream.sv_voxceleb1 import expert as module
    from s3prl.downstream.sv_voxceleb1.utils import EER

    names = [f"/corpus/test/wav/id1027{index}/video/0000{index}.wav" for index in range(3)]
    trials = [(label, names[one], names[two]) for label, one, two in inputs.TRIALS]
    module.SpeakerVerifi_train = lambda **_: SimpleNamespace(speaker_num=inputs.ASV_SPEAKERS)
    module.SpeakerVerifi_test = lambda **_: SimpleNamespace(pair_table=trials)
    setattr(Tensor, "cuda", lambda self, *_: self)  # noqa: B010  # the expert moves its mask, also where there is no GPU
    settings = yaml.safe_load((source / "s3prl/downstream/sv_voxceleb1/configs/amsoftmax.yaml").read_text())
    expert = module.DownstreamExpert(WIDTH, settings["downstream_expert"], str(folder))
    inputs.fill(nn.ModuleList([expert.connector, expert.model, expert.objective]), SEEDS["head"])
    expert.eval()
    outputs: list[Tensor] = []
    kept(outputs, expert.model)
    kept(outputs, expert.model.agg_method)
    utterances = inputs.features(SEEDS["asv"], inputs.ASV_FRAMES)
    loss = expert("train", utterances, None, list(inputs.ASV_TARGETS), defaultdict(list))
    pooled, output = outputs
    found: Values = {"pooled": pooled[:, ::25], "output": output, "loss": loss.item()}
    found["gradient_norms"] = gradient_norms(nn.ModuleList([expert.connector, expert.model, expert.objective]), loss)
    records: Any = defaultdict(list)
    with torch.no_grad():
        expert("test", utterances, names, None, records)
        found["embeddings"] = torch.stack([records[name] for name in names])
        alone: Any = defaultdict(list)
        for utterance, name in zip(utterances, names, strict=True):
            expert("test", [utterance], [name], None, alone)
        found["embeddings alone"] = torch.stack([alone[name] for name in names])
    logger = Logger()
    expert.log_records("test", alone, logger, 0)
    found["trials EER"] = logger.scalars["test-EER"]
    found["file test_predict.txt"] = (folder / "test_predict.txt").read_text()
    labels = (inputs.shares(SEEDS["eer"], inputs.EER_TRIALS) < 0.5).astype(int)
    scores = inputs.noise(SEEDS["eer"] + 1, inputs.EER_TRIALS) + 0.5 * labels
    found["EER"], found["EER threshold"] = map(float, EER(labels, scores))
    return found


def kaldi_folder(folder: Path) -> Path:
    """Recording ``r`` with the segments of the inputs, and silence as its audio."""
    soundfile.write(folder / "r.wav", np.zeros(int(inputs.SD_SECONDS * 16_000)), 16_000)
    names = [f"u{index}" for index in range(len(inputs.SD_SEGMENTS))]
    rows = list(zip(names, inputs.SD_SEGMENTS, strict=True))
    files = {
        "wav.scp": f"r {folder / 'r.wav'}\n",
        "reco2dur": f"r {inputs.SD_SECONDS}\n",
        "segments": "".join(f"{name} r {segment.start} {segment.end}\n" for name, segment in rows),
        "utt2spk": "".join(f"{name} {segment.speaker}\n" for name, segment in rows),
        "spk2utt": "".join(
            f"{speaker} {' '.join(name for name, segment in rows if segment.speaker == speaker)}\n" for speaker in "ab"
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def diarization(source: Path, folder: Path) -> Values:
    from s3prl.downstream.diarization.dataset import DiarizationDataset
    from s3prl.downstream.diarization.expert import DownstreamExpert
    from s3prl.downstream.diarization.utils import calc_diarization_error, get_label_perm, pit_loss

    settings = config_of(source, "diarization/config.yaml")
    expert = DownstreamExpert(WIDTH, inputs.SD_HOP, settings, str(folder))
    datarc = expert.datarc | {"chunk_size": inputs.SD_CHUNK}
    chunks: dict[str, list[Any]] = {}
    for mode in ("train", "test"):
        data = DiarizationDataset(mode, str(kaldi_folder(folder)), **datarc)
        chunks[mode] = [data[index][1] for index in range(len(data))]
    labels = chunks["train"]
    found: Values = {f"labels {index}": chunk for index, chunk in enumerate(labels)}
    found["labels of test"] = np.concatenate(chunks["test"][0])
    inputs.fill(expert.model, SEEDS["head"])
    utterances = inputs.features(SEEDS["sd"], inputs.SD_FRAMES)
    padded = nn.utils.rnn.pad_sequence(utterances, batch_first=True)
    padded_labels = nn.utils.rnn.pad_sequence([torch.from_numpy(label).float() for label in labels], batch_first=True)
    found["matched"] = expert._match_length(padded, padded_labels)[0]
    outputs: list[Tensor] = []
    kept(outputs, expert.model)
    records: Any = defaultdict(list)
    lengths = [len(label) for label in labels]
    floats = [label.astype(np.float32) for label in labels]
    loss = expert("train", utterances, floats, lengths, None, records)
    found |= {"output": outputs[0], "loss": loss.item(), "gradient_norms": gradient_norms(expert.model, loss)}
    _, indices, permutations = pit_loss(outputs[0], padded_labels, torch.tensor(lengths))
    found["permutations"] = np.array([permutations[index] for index in indices])
    permuted = get_label_perm(padded_labels, indices, permutations)
    found["errors"] = np.array(calc_diarization_error(outputs[0], permuted, torch.tensor(lengths)))
    found |= {"accuracy": records["acc"][0], "der": records["der"][0]}
    alone: Any = defaultdict(list)
    for utterance, label in zip(utterances, floats, strict=True):
        expert("dev", [utterance], [label], [len(label)], None, alone)
    found["accuracy alone"], found["loss alone"] = np.array(alone["acc"]), np.array(alone["loss"])
    return found | rttms(source, folder)


def rttms(source: Path, folder: Path) -> Values:
    """Lines of make_rttm.py for each threshold and median filter."""
    probabilities = inputs.shares(SEEDS["probabilities"], inputs.SD_PROBABILITIES, 2).astype(np.float32)
    with h5py.File(folder / "r.h5", "w") as file:
        file.create_dataset("T_hat", data=probabilities)
    (folder / "list").write_text(f"{folder / 'r.h5'}\n")
    found: Values = {}
    for threshold, median in inputs.SD_GRID:
        script = source / "s3prl" / "downstream" / "diarization" / "make_rttm.py"
        options = ["--threshold", str(threshold), "--median", str(median), "--frame_shift", str(inputs.SD_HOP)]
        subprocess.run([sys.executable, script, folder / "list", folder / "rttm", *options], check=True)
        found[f"rttm {threshold} {median}"] = (folder / "rttm").read_text()
    return found


def query_by_example(source: Path, folder: Path) -> Values:
    from s3prl.downstream.quesst14_dtw.expert import DownstreamExpert, cosine_exp, match

    settings = config_of(source, "quesst14_dtw/config.yaml") | {"max_workers": 1}
    expert = DownstreamExpert(WIDTH, settings, str(folder))
    lengths = (*inputs.QBE_QUERIES, *inputs.QBE_DOCUMENTS)
    records: Any = defaultdict(list)
    names = [f"q{index}" for index in range(len(inputs.QBE_QUERIES))]
    names += [f"d{index}" for index in range(len(inputs.QBE_DOCUMENTS))]
    utterances = [3 * feature + 1 for feature in inputs.features(SEEDS["qbe"], lengths)]
    expert("dev", utterances, names, records)
    expert.test_dataset = SimpleNamespace(n_queries=len(inputs.QBE_QUERIES))
    expert.log_records("dev", records)
    # What log_records computes on the way.
    joined = torch.cat(utterances)
    mean_D, std_D = joined.mean(0), torch.clamp(joined.std(0), 1e-9)
    normalised = [((utterance - mean_D) / std_D).numpy() for utterance in utterances]
    queries, documents = normalised[: len(inputs.QBE_QUERIES)], normalised[len(inputs.QBE_QUERIES) :]
    options = {
        "step_pattern": "asymmetric", "keep_internals": False, "distance_only": False, "open_begin": True,
        "open_end": True,
    }  # fmt: skip
    scores = [
        [match(query, document, "", "", cosine_exp, True, options)[2] for document in documents]
        for query in queries
        if len(query) >= 5
    ]
    return {
        "mean": mean_D,
        "std": std_D,
        "first query": queries[0],
        "distances": cosine_exp(queries[0], documents[1]),
        "scores": np.array(scores),
        "file benchmark.stdlist.xml": (folder / "benchmark.stdlist.xml").read_text(),
    }


ADDED = {"er": emotion_recognition, "asv": speaker_verification, "sd": diarization, "qbe": query_by_example}
