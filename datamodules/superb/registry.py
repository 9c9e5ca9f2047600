"""The data of every task, one row each: its corpus, the columns of a table, its label lists and its batches.

A new task needs a reader of its corpus, a row here, and a row with its class in
:data:`lightning_modules.superb.recipes.TASK_RECIPES`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from datamodules.alignments import corpus_folder
from datamodules.errors import InputError
from datamodules.frames import HOP
from datamodules.superb.aligned import read_aligned
from datamodules.superb.effects import Effects
from datamodules.superb.fluent import read_fluent, require_fluent
from datamodules.superb.iemocap import FOLDS, read_iemocap, require_iemocap
from datamodules.superb.librimix import chunk_of, read_librimix, require_librimix
from datamodules.superb.librispeech import read_librispeech, require_librispeech
from datamodules.superb.quesst import read_quesst14, require_quesst14
from datamodules.superb.recipes import DataRecipe
from datamodules.superb.rows import MIN_SAMPLES, Reading, Row, SuperbCorpus
from datamodules.superb.snips import read_snips, require_snips
from datamodules.superb.speech_commands import read_speech_commands, require_speech_commands
from datamodules.superb.subsets import limited
from datamodules.superb.table import (
    INTENT,
    LABEL,
    ROLE,
    SEGMENTS,
    SLOTS,
    SPEAKER,
    TEXT,
    TableLayout,
    read_table,
    require_table,
)
from datamodules.superb.voxceleb import read_voxceleb1, require_voxceleb1
from datamodules.superb.voxceleb_trials import read_voxceleb1_trials, require_voxceleb1_trials

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuperbData:
    """The corpus of a task and the parts of it to use.

    Args:
        root: the corpus folder, in the published layout of the task's corpus, or a ``.tsv`` table (any task).
        test_root: folder of the test archive of KS, if it is not beside the train archive.
        train_splits: LibriSpeech splits to train on (PR, ASR).
        dev_splits: splits on which the checkpoint is selected (PR, ASR).
        test_splits: splits to test on, each separately (PR, ASR).
        labels: label lists that replace the corpus's own (SID and ER, and KS and ASV with a table: one list; IC: three;
            SF: one, the slot types).
        resample: convert files of another rate or several channels (to their mean) instead of treating them as bad; QbE
            always does.
        on_bad_audio: "error" stops at the first bad file; "skip" leaves bad files out and counts them.
        max_train_utterances: size of a random subset of train, for probes; default: all utterances. In KS, SID and ER
            it has some of each class.
        max_eval_utterances: size of a random subset of dev and of each test, for probes; default: all utterances. In
            ASV and QbE pairs are drawn, in SD whole recordings.
        num_workers: loader processes per rank. The default is 2; on a GPU it is the number of cores per process minus
            one, from 2 to 8.
        cache_dir: folder of cached LibriSpeech manifests and of ASV's lengths without silence; by default interstack/
            in $XDG_CACHE_HOME or ~/.cache.
    """

    root: str
    test_root: str | None = None
    train_splits: Sequence[str] = ("train-clean-100",)
    dev_splits: Sequence[str] = ("dev-clean",)
    test_splits: Sequence[str] = ("test-clean",)
    labels: list[list[str]] | None = None
    resample: bool = False
    on_bad_audio: Literal["error", "skip"] = "error"
    max_train_utterances: int | None = None
    max_eval_utterances: int | None = None
    num_workers: int | None = None
    cache_dir: str | None = None

    @property
    def is_table(self) -> bool:
        return self.root.endswith(".tsv")

    @property
    def splits(self) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
        return self.train_splits, self.dev_splits, self.test_splits


class Corpus(NamedTuple):
    """A corpus in its published layout.

    Attributes:
        read: reads its rows.
        require: checks that its files exist, without reading audio.
        fixed_labels: reason for which the setting ``labels`` does not apply to it; empty if it does.
        folds: names of its folds; each is a run of its own, and the result is their mean.
    """

    read: Callable[[SuperbData, Reading], SuperbCorpus]
    require: Callable[[SuperbData], object]
    fixed_labels: str = ""
    folds: tuple[str, ...] = ()


LIBRISPEECH = Corpus(
    lambda data, reading: read_librispeech(data.root, *data.splits, reading, data.cache_dir),
    lambda data: require_librispeech(data.root, [split for part in data.splits for split in part]),
)
SNIPS = Corpus(lambda data, reading: read_snips(data.root, data.labels, reading), lambda data: require_snips(data.root))
SPEECH_COMMANDS = Corpus(
    lambda data, reading: read_speech_commands(data.root, data.test_root, reading),
    lambda data: require_speech_commands(data.root, data.test_root),
    "Speech Commands has twelve fixed labels; a .tsv table has any",
)
FLUENT = Corpus(
    lambda data, reading: read_fluent(data.root, data.labels, reading), lambda data: require_fluent(data.root)
)
VOXCELEB1 = Corpus(
    lambda data, reading: read_voxceleb1(data.root, data.labels, reading), lambda data: require_voxceleb1(data.root)
)
IEMOCAP = Corpus(
    lambda data, reading: read_iemocap(data.root, data.labels, reading),
    lambda data: require_iemocap(data.root),
    folds=FOLDS,
)
VOXCELEB1_TRIALS = Corpus(
    lambda data, reading: read_voxceleb1_trials(data.root, reading),
    lambda data: require_voxceleb1_trials(data.root),
    "its labels are the speakers that occur in no trial; a .tsv table has any",
)
LIBRIMIX = Corpus(lambda data, reading: read_librimix(data.root, reading), lambda data: require_librimix(data.root))
QUESST14 = Corpus(lambda data, reading: read_quesst14(data.root, reading), lambda data: require_quesst14(data.root))
ALIGNED_PHONES = Corpus(
    lambda data, reading: read_aligned(data.root, *data.splits, reading), lambda data: corpus_folder(data.root)
)
ALIGNED_FRAMES = Corpus(
    lambda data, reading: read_aligned(data.root, *data.splits, reading, timed=True), ALIGNED_PHONES.require
)


XVECTOR_FRAMES = 17
"""Frames of the shortest utterance that an x-vector can be computed of: 14 of context, two to average, one to spare."""


@dataclass(frozen=True)
class TaskSource:
    """The data of one task.

    Attributes:
        corpus: published corpus that the task reads.
        recipe: recipe of its batches.
        table: columns of a table in place of the corpus; ``None``: the task reads no table.
        labels: contents of the setting ``labels``, one name for each list; empty if the targets are no labels.
        targets: name of targets that are no labels.
        without_lexicon: corpus that is read in place of transcripts if there is no lexicon for them; ``None``: the task
            needs no lexicon.
        recording: recording of a row, where rows are parts of recordings that are scored as a whole.
    """

    corpus: Corpus
    recipe: DataRecipe
    table: TableLayout | None = None
    labels: tuple[str, ...] = ()
    targets: str = "transcripts"
    without_lexicon: Corpus | None = None
    recording: Callable[[Row], str] | None = None

    def corpus_of(self, data: SuperbData, has_lexicon: bool = True) -> Corpus:
        """The corpus at ``data.root``."""
        if self.without_lexicon is not None and not has_lexicon:
            return self.without_lexicon
        if self.table is None or not data.is_table:
            return self.corpus
        layout = self.table
        return Corpus(
            lambda data, reading: read_table(data.root, layout, data.labels, reading),
            lambda data: require_table(data.root, layout),
        )


SOURCES: dict[str, TaskSource] = {
    "pr": TaskSource(
        LIBRISPEECH, DataRecipe("window", batch_size=16, accumulate=2), TEXT, without_lexicon=ALIGNED_PHONES
    ),
    "ks": TaskSource(
        SPEECH_COMMANDS,
        DataRecipe(
            "balanced",
            batch_size=32,
            eval_batch_size=32,
            silence_samples=16_000,
            effects=Effects(gain_db=-3.0),
            balanced_dev=True,
        ),
        LABEL,
        ("labels",),
    ),
    "ic": TaskSource(
        FLUENT, DataRecipe("shuffled", batch_size=32, eval_batch_size=32), INTENT, ("actions", "objects", "locations")
    ),
    "sid": TaskSource(
        VOXCELEB1, DataRecipe("shuffled", batch_size=8, accumulate=4, train_max_samples=128_000), LABEL, ("labels",)
    ),
    "er": TaskSource(
        IEMOCAP, DataRecipe("shuffled", batch_size=4, accumulate=8, eval_batch_size=4), LABEL, ("emotions",)
    ),
    # The config has 32; training uses its halves of 16.
    "asr": TaskSource(LIBRISPEECH, DataRecipe("halved", batch_size=32), TEXT),
    # Its recordings have 8 kHz.
    "qbe": TaskSource(
        QUESST14,
        DataRecipe("shuffled", batch_size=1, effects=Effects(gain_db=-3.0), resample=True),
        ROLE,
        targets="queries and documents",
    ),
    "sf": TaskSource(SNIPS, DataRecipe("window", batch_size=32), SLOTS, ("slot types",)),
    "asv": TaskSource(
        VOXCELEB1_TRIALS,
        DataRecipe(
            "shuffled",
            batch_size=10,
            accumulate=5,
            train_max_samples=128_000,
            effects=Effects(gain_db=-3.0, remove_silence=True),
            min_frames=XVECTOR_FRAMES,
            min_train_samples=32_001,
        ),
        SPEAKER,
        ("speakers of train",),
    ),
    "sd": TaskSource(
        LIBRIMIX,
        DataRecipe("shuffled", batch_size=8, accumulate=4),
        SEGMENTS,
        targets="segments of speech",
        recording=lambda row: chunk_of(row.key)[0],
    ),
    # A probe, on any corpus with phone alignments.
    "frames": TaskSource(ALIGNED_FRAMES, DataRecipe("shuffled", batch_size=16), targets="phones of alignments"),
}


def find_source(task: str) -> TaskSource:
    """The row of a task.

    Raises:
        InputError: there is no such task.
    """
    if task not in SOURCES:
        raise InputError(f"there is no task {task!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[task]


def read_corpus(
    task: str, data: SuperbData, seed: int = 1337, has_lexicon: bool = True, hop: int = HOP, fold: str = ""
) -> SuperbCorpus:
    """Read the corpus of a task, limited to the subsets of ``data``.

    Args:
        task: a key of :data:`SOURCES`.
        data: the corpus and the parts of it to use.
        seed: random seed of the subsets.
        has_lexicon: whether a task that needs a lexicon has one; otherwise phone alignments are read.
        hop: samples from one frame of the encoder to the next.
        fold: the fold to read of a corpus that has folds.

    Raises:
        InputError: there is no such task, the corpus is missing, or it has an error.
    """
    require_label_lists(task, data)
    source = find_source(task)
    recipe = source.recipe
    reading = Reading(
        data.resample or recipe.resample,
        data.on_bad_audio,
        max(MIN_SAMPLES, recipe.min_frames * hop),
        recipe.effects,
        data.cache_dir,
        hop,
        fold,
    )
    corpus = source.corpus_of(data, has_lexicon).read(data, reading)
    if corpus.skipped and source.recording is not None:  # a recording is scored as a whole
        bad = {problem.path for problem in corpus.skipped}
        whole = {name: [row for row in rows if row.path not in bad] for name, rows in corpus.splits.items()}
        corpus = replace(corpus, train=whole.pop("train"), dev=whole.pop("dev"), tests=whole)
    if corpus.skipped:
        first = corpus.skipped[0]
        logger.warning("%d files left out, the first: %s: %s", len(corpus.skipped), first.path, first.reason)
    long_enough = [row for row in corpus.train if row.num_samples >= recipe.min_train_samples]
    if short := len(corpus.train) - len(long_enough):
        logger.warning(
            "%d of %d utterances of train left out: shorter than %d samples",
            *(short, len(corpus.train), recipe.min_train_samples),
        )
    if corpus.train and not long_enough:
        raise InputError(f"no utterance of train has {recipe.min_train_samples} samples; task {task} needs some")
    return limited(
        replace(corpus, train=long_enough, too_short=short),
        data.max_train_utterances,
        data.max_eval_utterances,
        seed,
        classes=source.table is LABEL,
        recording=source.recording,
    )


def require_label_lists(task: str, data: SuperbData) -> None:
    """Check that the setting ``labels`` fits the task.

    Raises:
        InputError: the task has no labels, its corpus fixes them, or the number of lists is wrong.
    """
    source = find_source(task)
    if data.labels is None:
        return
    if reason := source.corpus_of(data).fixed_labels or ("" if source.labels else f"its targets are {source.targets}"):
        raise InputError(f"`labels` does not fit task {task}: {reason}")
    if len(data.labels) != len(source.labels):
        needed = ", ".join(source.labels)
        raise InputError(f"`labels` has {len(data.labels)} lists; task {task} needs {len(source.labels)} ({needed})")
