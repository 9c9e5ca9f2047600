"""A student with a head of KS, IC, SID or ER as transformers' own class, so that its ``pipeline`` runs it.

``HubertForSequenceClassification`` with ``use_weighted_layer_sum`` has the structure of SUPERB's heads for whole
utterances: softmax weights over all hidden states, a projection, the mean over valid frames, and a linear layer. No
class of transformers has the other heads: those for CTC read the last hidden state alone, by one linear layer.
"""

from typing import Any

from transformers import HubertConfig, HubertForSequenceClassification, HubertModel

from datamodules.errors import InputError
from lightning_modules.deployment.head import TrainedHead
from lightning_modules.export import Attached, StudentCheckpoint
from lightning_modules.superb.classification_tasks import ClassificationTask
from lightning_modules.superb.heads import MeanPoolLinear
from lightning_modules.superb.upstream import LoadedEncoder


def attached(student: StudentCheckpoint, name: str, trained: TrainedHead) -> Attached:
    """Put a head behind the student that it was trained on.

    Args:
        student: the student, in float32.
        name: name of the folder that will hold both.
        trained: the head.

    Raises:
        InputError: transformers has no class with this head, or it was trained on another encoder.
    """
    model = classifier(student.model, trained)
    trained.require_fit(LoadedEncoder(student.model, student.meta["normalize"], student.meta["sample_rate"]))
    return Attached(model, usage(trained, name), trained.described())


def classifier(student: HubertModel, trained: TrainedHead) -> HubertForSequenceClassification:
    """A student with a head behind it; the classes of several label lists follow one another.

    Args:
        student: the student that the head was trained on.
        trained: the head.

    Raises:
        InputError: transformers has no class with this head.
    """
    head, weights_L = trained.head, trained.featurizer.weights_L
    # Transformers 5 sums the last state before the final norm, which heads see after it.
    plain = type(student) is HubertModel and not student.config.do_stable_layer_norm
    if type(head) is not MeanPoolLinear or not plain:
        raise InputError(
            f"no class of transformers has the head in {trained.folder!r} (task {trained.name}, preset "
            f"{trained.preset}) behind such a student: use --format onnx"
        )
    labels = [label for names in label_lists(trained) for label in names]
    own = {
        "use_weighted_layer_sum": weights_L is not None,
        "classifier_proj_size": head.projector.out_features,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    model: Any = HubertForSequenceClassification(HubertConfig.from_dict(student.config.to_dict() | own)).eval()
    model.hubert.load_state_dict(student.state_dict())
    model.projector.load_state_dict(head.projector.state_dict())
    model.classifier.load_state_dict(head.linear.state_dict())
    if weights_L is not None:
        model.layer_weights.data.copy_(weights_L)
    return model


def label_lists(trained: TrainedHead) -> list[list[str]]:
    """The label lists of a head for whole utterances."""
    assert isinstance(trained.task, ClassificationTask)
    return trained.task.labels


def usage(trained: TrainedHead, name: str) -> str:
    """The section of a model card that shows how to use the classifier.

    Args:
        trained: the head.
        name: name of the folder.
    """
    sizes = [len(names) for names in label_lists(trained)]
    text = _ONE_LIST if len(sizes) == 1 else _SEVERAL_LISTS
    return text.format(name=name, sizes=sizes)


_ONE_LIST = """## Use

```python
from transformers import pipeline

classify = pipeline("audio-classification", model="{name}")
print(classify(waveform))  # a NumPy array, 16 kHz
```"""

_SEVERAL_LISTS = """## Use

An utterance has one label from each of several lists, whose logits follow one another. The scores of transformers'
`pipeline` are shares over all lists together, so split the logits:

```python
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

extractor = AutoFeatureExtractor.from_pretrained("{name}")
classifier = AutoModelForAudioClassification.from_pretrained("{name}").eval()
inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt").to(classifier.dtype)
logits = classifier(**inputs).logits[0]
names = [classifier.config.id2label[number] for number in range(len(logits))]
for part in logits.split({sizes}):
    print(names[int(part.argmax())])
    names = names[len(part) :]
```"""
