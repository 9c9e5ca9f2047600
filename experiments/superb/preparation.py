"""Read a corpus and build its task so that all targets can be encoded; what is left out is counted."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from datamodules.alignments import corpus_folder
from datamodules.errors import InputError
from datamodules.superb.aligned import read_aligned
from datamodules.superb.datamodule import limited, read_corpus, require_corpus, require_label_lists
from datamodules.superb.rows import Reading, Row, SuperbCorpus
from experiments.superb.options import RunSettings, TaskData
from lightning_modules.superb.ctc import is_feasible
from lightning_modules.superb.frames import FrameTask
from lightning_modules.superb.tasks import CtcTask, ProbeStart, Task, build_task
from lightning_modules.superb.tokenizers import PhoneTokenizer, read_lexicon
from lightning_modules.superb.upstream import Upstream

log = logging.getLogger(__name__)

MOST_WORDS_SHOWN = 20
TABLE_WITHOUT_LEXICON = "task pr with a table needs --data.lexicon: files of lines 'WORD PHONE PHONE ...'"


@dataclass(frozen=True)
class Prepared:
    """A task with its corpus.

    Attributes:
        task: task built for the corpus.
        corpus: corpus without the utterances that had to be left out.
        unknown_words: utterances left out for a word that is not in the lexicon, by split.
        unknown_symbols: characters or phones of the targets that the inventory lacks, by split; they become ``<unk>``.
    """

    task: Task
    corpus: SuperbCorpus
    unknown_words: dict[str, int]
    unknown_symbols: dict[str, int]

    def target_length(self, row: Row) -> int:
        """Encoded length of the target, ``<eos>`` included."""
        assert isinstance(self.task, CtcTask)
        return len(self.task.tokenizer.encode(row.target))

    def infeasible(self, upstream: Upstream) -> dict[str, int]:
        """Count utterances by split that have too few frames for their target: they have no loss, but are scored."""
        task = self.task
        if not isinstance(task, CtcTask):
            return {}

        def frames(row: Row) -> int:
            return min(round(row.num_samples / upstream.rate), upstream.num_frames(row.num_samples))

        return {
            split: sum(not is_feasible(task.tokenizer.encode(row.target), frames(row)) for row in rows)
            for split, rows in self.corpus.splits.items()
        }

    def probe_start(self, upstream: Upstream) -> ProbeStart:
        """Count frames and symbols of the training set."""
        frames = sum(upstream.num_frames(row.num_samples) for row in self.corpus.train)
        symbols = sum(map(self.target_length, self.corpus.train)) if isinstance(self.task, CtcTask) else 0
        return ProbeStart(frames, symbols)


def prepare(settings: RunSettings) -> Prepared:
    """Read the corpus and build the task.

    Raises:
        InputError: the corpus is faulty, the lexicon lacks words, or two test sets would be written to one file.
    """
    prepared = _prepared(settings)
    owners: dict[str, str] = {}
    for test in prepared.corpus.tests:
        for file in prepared.task.hypothesis_files(test, []):
            if file in owners:
                raise InputError(
                    f"the test sets {owners[file]!r} and {test!r} would both be written to {file}: rename one of them"
                )
            owners[file] = test
    return prepared


def _prepared(settings: RunSettings) -> Prepared:
    data = settings.data
    if settings.task == "frames":
        corpus = _aligned_corpus(settings.task, data, settings.seed)
        return _counted(FrameTask(corpus.labels[0]), corpus)
    if settings.task != "pr":
        corpus = read_corpus(settings.task, data, settings.seed)
        return _counted(build_task(settings.task, corpus.labels, None, settings.decode), corpus)
    if data.lexicon is None and not data.root.endswith(".tsv"):
        corpus = _aligned_corpus("pr", data, settings.seed)
        return _counted(build_task("pr", [], PhoneTokenizer(corpus.labels[0]), settings.decode), corpus)
    if data.lexicon is None:
        raise InputError(TABLE_WITHOUT_LEXICON)
    paths = [data.lexicon] if isinstance(data.lexicon, str) else list(data.lexicon)
    tokenizer = PhoneTokenizer(lexicon=read_lexicon(paths))
    corpus, left_out = _known_words(read_corpus("pr", data, settings.seed), tokenizer, data)
    return _counted(build_task("pr", [], tokenizer, settings.decode), corpus, left_out)


def _counted(task: Task, corpus: SuperbCorpus, unknown_words: dict[str, int] | None = None) -> Prepared:
    symbols = _unknown_symbols(task, corpus)
    counts = {split: found.total() for split, found in symbols.items()}
    if shown := sorted(set[str]().union(*symbols.values())):
        log.warning("the inventory of task %s lacks %s, which become <unk>: %s", task.name, " ".join(shown), counts)
    return Prepared(task, corpus, unknown_words or {}, counts)


def _unknown_symbols(task: Task, corpus: SuperbCorpus) -> dict[str, Counter[str]]:
    if not isinstance(task, CtcTask):
        return {}
    tokenizer, known = task.tokenizer, set(task.tokenizer.symbols)
    return {
        split: Counter(symbol for row in rows for symbol in tokenizer.target(row.target) if symbol not in known)
        for split, rows in corpus.splits.items()
    }


def require_inputs(task: str, data: TaskData) -> None:
    """Check that a task's corpus exists, and for PR the phones or the lexicon; no audio is read.

    Raises:
        InputError: something is missing.
    """
    if task == "frames":
        corpus_folder(data.root)
    elif task == "pr" and data.lexicon is None:
        if data.root.endswith(".tsv"):
            raise InputError(TABLE_WITHOUT_LEXICON)
        with _asking_for_phones():
            corpus_folder(data.root)
    else:
        require_corpus(task, data)


@contextmanager
def _asking_for_phones() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(
            f"task pr needs phones: give --data.lexicon (files of lines 'WORD PHONE PHONE ...'), or a corpus with "
            f"phone alignments ({error})"
        ) from error


def _aligned_corpus(task: str, data: TaskData, seed: int) -> SuperbCorpus:
    require_label_lists(task, data)
    reading, timed = Reading(data.resample, data.on_bad_audio), task == "frames"
    with nullcontext() if timed else _asking_for_phones():
        corpus = read_aligned(data.root, data.train_splits, data.dev_splits, data.test_splits, reading, timed)
    return limited(corpus, data, seed)


def _known_words(
    corpus: SuperbCorpus, tokenizer: PhoneTokenizer, data: TaskData
) -> tuple[SuperbCorpus, dict[str, int]]:
    """Leave out the utterances with unknown words; return the corpus and their number by split."""
    missing = sorted(
        {word for rows in corpus.splits.values() for row in rows for word in tokenizer.missing(row.target)}
    )
    if not missing:
        return corpus, {}
    words = " ".join(missing[:MOST_WORDS_SHOWN]) + (" ..." if len(missing) > MOST_WORDS_SHOWN else "")
    if data.unknown_words == "error":
        raise InputError(
            f"the lexicon lacks {len(missing)} words of the corpus: {words}. Add a lexicon that has them "
            "(SUPERB's is two files), or leave their utterances out with --data.unknown_words skip"
        )
    kept = {name: _covered(rows, tokenizer) for name, rows in corpus.splits.items()}
    left_out = {name: len(rows) - len(kept[name]) for name, rows in corpus.splits.items()}
    log.warning("left out utterances with one of %d unknown words (%s): %s", len(missing), words, left_out)
    if empty := [name for name, rows in kept.items() if not rows]:
        raise InputError(f"no utterance of {empty[0]!r} is left: every one has a word that the lexicon lacks")
    tests = {name: kept[name] for name in corpus.tests}
    return replace(corpus, train=kept["train"], dev=kept["dev"], tests=tests), left_out


def _covered(rows: Sequence[Row], tokenizer: PhoneTokenizer) -> list[Row]:
    return [row for row in rows if not tokenizer.missing(row.target)]
