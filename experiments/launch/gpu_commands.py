"""Commands for a machine with one GPU and no network, most valuable first.

Each command has at most 2,000 characters and runs for at most ten minutes. State stays in ``gpu_results`` of the
working tree, so that a repeated command continues; results to copy back are packed into ``$OUT``.
"""

import json
from typing import NamedTuple

MOST_SECONDS, MOST_CHARACTERS = 600, 2000
PREPARE = (
    'S="${TMPDIR:-/tmp}/interstack"; [ -d "$S/site" ] || { python3 -m pip install -q --no-index --no-deps --no-compile '
    '--no-cache-dir --target "$S/part" .bundle/wheels/*.whl && mv "$S/part" "$S/site"; } || exit 1; '
    'export PYTHONPATH="$S/site:$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR="$S/inductor" '
    'INTERSTACK_COMMIT="$(cat .bundle/commit)"; OUT="${OUT:-gpu_results}"; mkdir -p gpu_results "$OUT"; '
    "ulimit -n 65536 || true; set -o pipefail; "
)
SUITE = "python3 -m experiments.cli bench suite --accelerator gpu --output gpu_results/suite"
PROFILES = ("features", "small", "large", "shared", "shallow", "float32")
OTHER_PROFILES = json.dumps([f"profile_{name}" for name in PROFILES])
# Tests that compare a run with itself, whatever the device.
OWN_TESTS = (
    "tests/test_switches.py tests/callbacks/test_guards.py tests/callbacks/test_ema.py tests/callbacks/test_resume.py "
    "tests/callbacks/test_stacking.py tests/callbacks/test_checkpointing.py tests/lightning_modules"
)
NOISE = (
    "from pathlib import Path; from experiments.bench.compare import write_noise; "
    "from experiments.bench.random_teacher import save_random_teacher; folder = Path('gpu_results/ddp'); "
    "(folder / 'LibriSpeech').exists() or (write_noise(folder, 80, 15.0), save_random_teacher(folder / 'teacher'))"
)
# Options of a growing run; a shell variable in the commands keeps them short.
FIT = (
    "--config interleave_equal --runs_dir gpu_results/ddp/runs --ckpt_path last "
    "--data.root gpu_results/ddp/LibriSpeech --data.cache_dir gpu_results/ddp/cache "
    "--data.train_splits [train-clean-100] --data.val_splits [] --data.batch_size 16 --data.batches_per_epoch 5 "
    "--model.teacher.init_args.model gpu_results/ddp/teacher --growth.verify true --wandb.mode disabled "
    "--log_samples false --trainer.enable_progress_bar false --trainer.limit_val_batches 0 "
    "--trainer.max_epochs 4 --trainer.devices 1"
)


class Command(NamedTuple):
    """One command: title, text without ``PREPARE``, whether a repeated call continues it, and time limit in seconds."""

    title: str
    body: str
    repeat: bool = False
    limit: int = MOST_SECONDS

    @property
    def text(self) -> str:
        """The full text of the command."""
        return PREPARE + self.body


def commands() -> list[Command]:
    """List all commands in order; each needs ``.bundle``."""
    study = "timeout 570 python3 -m experiments.cli reproduce table1_gpu_short --output gpu_results/study"
    pack = 'tar czf "$OUT/study.tgz" -C gpu_results --exclude=corpus --exclude="*.ckpt" --exclude="*.safetensors" study'
    return [
        Command(
            "tests of the GPU",
            "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv; "
            'timeout 560 python3 -m pytest -q tests/gpu --device cuda 2>&1 | tee "$OUT/tests_gpu.log" | tail -n 60',
        ),
        Command("the benchmarks' suite", _suite(f"{SUITE} --budget 540"), repeat=True),
        Command("profiles of other steps", _suite(f"{SUITE} --budget 540 --only '{OTHER_PROFILES}'"), repeat=True),
        Command("whole runs that decide", _suite(f"{SUITE} --budget 540 --only '[\"compare\"]'"), repeat=True),
        Command("DDP: one process over NCCL, and the same again, which is resumed; two over gloo on one GPU", _ddp()),
        Command(
            "the repository's own tests, with runs on the GPU (what fails is to be read: not all of it is wrong)",
            f"timeout 560 python3 -m pytest -p tests.on_gpu --device cuda -q -n 6 -m 'not slow' {OWN_TESTS} 2>&1 "
            '| tee "$OUT/tests_own.log" | tail -n 60',
        ),
        Command(
            "a short study: corpus, teacher, three students",
            f"{study} --only '[full_l2l,interleave_equal,midas_equal]' 2>&1 | tail -n 25; {pack}",
            repeat=True,
        ),
    ]


def _suite(call: str) -> str:
    return f'timeout 580 {call} 2>&1 | tail -n 60; tar czf "$OUT/suite.tgz" -C gpu_results suite'


def _ddp() -> str:
    start, fit = "python3 -m torch.distributed.run --nproc_per_node 1", "-m experiments.cli fit $F"
    one = f"timeout 120 {start} --standalone {fit} --name nccl --trainer.strategy ddp"
    two = (
        f'timeout 200 {start} --nnodes 2 --node_rank "$n" --rdzv_backend c10d --rdzv_endpoint localhost:29500 '
        f"--rdzv_id two {fit} --name gloo --trainer.num_nodes 2 --trainer.strategy "
        "lightning.pytorch.strategies.DDPStrategy --trainer.strategy.process_group_backend gloo"
    )
    return (
        f'set -f; F="{FIT}"; python3 -c "{NOISE}"; for i in 1 2; do {one} 2>&1 | tail -n 5; done | '
        f'tee "$OUT/nccl.log"; for n in 0 1; do {two} > "$OUT/gloo_$n.log" 2>&1 & done; wait; '
        'tail -n 5 "$OUT/gloo_0.log" "$OUT/gloo_1.log"'
    )
