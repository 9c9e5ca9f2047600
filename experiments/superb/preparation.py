"""Read a corpus and build its task so that all targets can be encoded; what is left out is counted."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from datamodules.errors import InputError
from datamodules.superb.registry import find_source, read_corpus, require_label_lists
from datamodules.superb.rows import Row, SuperbCorpus
from experiments.superb.options import RunSettings, TaskData
from lightning_modules.superb.ctc import is_feasible
from lightning_modules.superb.recipes import build_task
from lightning_modules.superb.tasks import ProbeStart, Task, TaskInputs
from lightning_modules.superb.tokenizers import Tokenizer
from lightning_modules.superb.upstream import Upstream

log = logging.getLogger(__name__)

MOST_WORDS_SHOWN = 20


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
        assert self.task.tokenizer is not None
        return len(self.task.tokenizer.encode(row.target))

    def infeasible(self, upstream: Upstream) -> dict[str, int]:
        """Count utterances by split that have too few frames for their target: they have no loss, but are scored."""
        tokenizer = self.task.tokenizer
        if tokenizer is None:
            return {}

        def frames(row: Row) -> int:
            return min(round(row.num_samples / upstream.rate), upstream.num_frames(row.num_samples))

        return {
            split: sum(not is_feasible(tokenizer.encode(row.target), frames(row)) for row in rows)
            for split, rows in self.corpus.splits.items()
        }

    def probe_start(self, upstream: Upstream) -> ProbeStart:
        """Count frames and symbols of the training set."""
        frames = sum(upstream.num_frames(row.num_samples) for row in self.corpus.train)
        symbols = sum(map(self.target_length, self.corpus.train)) if self.task.tokenizer else 0
        return ProbeStart(frames, symbols)


def prepare(settings: RunSettings, hop: int) -> Prepared:
    """Read the corpus and build the task.

    Args:
        settings: settings of the run.
        hop: samples from one frame of the encoder to the next.

    Raises:
        InputError: the corpus is faulty, the lexicon lacks words, or two test sets would be written to one file.
    """
    prepared = _prepared(settings, hop)
    owners: dict[str, str] = {}
    for test in prepared.corpus.tests:
        for file in prepared.task.hypothesis_files(test, []):
            if file in owners:
                raise InputError(
                    f"the test sets {owners[file]!r} and {test!r} would both be written to {file}: rename one of them"
                )
            owners[file] = test
    return prepared


def _prepared(settings: RunSettings, hop: int) -> Prepared:
    task, data = settings.task, settings.data
    require_label_lists(task, data)  # before what follows, because its error has nothing to do with phones
    with _asking_for_phones(task, data):
        corpus = read_corpus(task, data, settings.seed, data.lexicon is not None, hop, settings.fold)
    lexicon = [data.lexicon] if isinstance(data.lexicon, str) else data.lexicon
    built = build_task(task, TaskInputs(corpus.labels, lexicon, settings.decode, corpus.trials, settings.fold)).at_rate(
        hop
    )
    corpus, unknown_words = _known_words(corpus, built, data)
    symbols = _unknown_symbols(built.tokenizer, corpus)
    counts = {split: found.total() for split, found in symbols.items()}
    if shown := sorted(set[str]().union(*symbols.values())):
        log.warning("the inventory of task %s lacks %s, which become <unk>: %s", task, " ".join(shown), counts)
    return Prepared(built, corpus, unknown_words, counts)


def _unknown_symbols(tokenizer: Tokenizer | None, corpus: SuperbCorpus) -> dict[str, Counter[str]]:
    if tokenizer is None:
        return {}
    known = set(tokenizer.symbols)
    return {
        split: Counter(symbol for row in rows for symbol in tokenizer.target(row.target) if symbol not in known)
        for split, rows in corpus.splits.items()
    }


def require_inputs(task: str, data: TaskData) -> None:
    """Check that a task's corpus exists, and for PR the phones or the lexicon; no audio is read.

    Raises:
        InputError: something is missing.
    """
    with _asking_for_phones(task, data):
        find_source(task).corpus_of(data, data.lexicon is not None).require(data)


@contextmanager
def _asking_for_phones(task: str, data: TaskData) -> Iterator[None]:
    """Name the lexicon in the errors of a task that needs one and reads alignments without it."""
    if find_source(task).without_lexicon is None or data.lexicon is not None:
        yield
        return
    if data.is_table:
        raise InputError(f"task {task} with a table needs --data.lexicon: files of lines 'WORD PHONE PHONE ...'")
    try:
        yield
    except ValueError as error:
        raise InputError(
            f"task {task} needs phones: give --data.lexicon (files of lines 'WORD PHONE PHONE ...'), or a corpus with "
            f"phone alignments ({error})"
        ) from error


def _known_words(corpus: SuperbCorpus, task: Task, data: TaskData) -> tuple[SuperbCorpus, dict[str, int]]:
    """Leave out the utterances with unknown words; return the corpus and their number by split."""
    missing = sorted(
        {word for rows in corpus.splits.values() for row in rows for word in task.unknown_words(row.target)}
    )
    if not missing:
        return corpus, {}
    words = " ".join(missing[:MOST_WORDS_SHOWN]) + (" ..." if len(missing) > MOST_WORDS_SHOWN else "")
    if data.unknown_words == "error":
        raise InputError(
            f"the lexicon lacks {len(missing)} words of the corpus: {words}. Add a lexicon that has them "
            "(SUPERB's is two files), or leave their utterances out with --data.unknown_words skip"
        )
    kept = {name: _covered(rows, task) for name, rows in corpus.splits.items()}
    left_out = {name: len(rows) - len(kept[name]) for name, rows in corpus.splits.items()}
    log.warning("left out utterances with one of %d unknown words (%s): %s", len(missing), words, left_out)
    if empty := [name for name, rows in kept.items() if not rows]:
        raise InputError(f"no utterance of {empty[0]!r} is left: every one has a word that the lexicon lacks")
    tests = {name: kept[name] for name in corpus.tests}
    return replace(corpus, train=kept["train"], dev=kept["dev"], tests=tests), left_out


def _covered(rows: Sequence[Row], task: Task) -> list[Row]:
    return [row for row in rows if not task.unknown_words(row.target)]
