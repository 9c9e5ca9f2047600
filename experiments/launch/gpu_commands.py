"""Commands for a machine with one GPU and no network, most valuable first.

Each command has at most 2,000 characters and runs for at most ten minutes, or for ``L`` seconds if that is set before
it. State stays in ``gpu_results`` of the working tree, so that a repeated command continues; on a fresh machine the
benchmarks continue from ``.bundle/suite.tgz``. Results to copy back are packed into ``$OUT`` every half minute, because
a command that is killed packs nothing.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

MOST_SECONDS, MOST_CHARACTERS = 600, 2000
# A machine whose own name does not resolve would let torch.distributed.run wait.
PREPARE = (
    'S="${TMPDIR:-/tmp}/interstack"; [ -d "$S/site" ] || { python3 -m pip install -q --no-index --no-deps --no-compile '
    '--no-cache-dir --target "$S/part" .bundle/wheels/*.whl && mv "$S/part" "$S/site"; } || exit 1; '
    'export PYTHONPATH="$S/site:$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR="$S/inductor" '
    'INTERSTACK_COMMIT="$(cat .bundle/commit)" GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo; L="${L:-560}"; '
    'OUT="${OUT:-gpu_results}"; mkdir -p gpu_results "$OUT"; ulimit -n 65536 || true; set -o pipefail; '
    'grep -qw "$(hostname)" /etc/hosts || echo "127.0.0.1 $(hostname)" >> /etc/hosts || true; '
)
BENCH = "python3 -m experiments.cli bench"
# Unpacks the suite's results on a fresh machine; packs them now and then, and a last time.
KEEP = (
    "[ -d gpu_results/suite ] || [ ! -f .bundle/suite.tgz ] || tar xzf .bundle/suite.tgz -C gpu_results; "
    'keep() { tar czf "$OUT/part" -C gpu_results suite && mv "$OUT/part" "$OUT/suite.tgz"; }; '
    "(trap exit TERM; while sleep 30 & wait $!; do keep; done) > /dev/null 2>&1 & K=$!; "
)
TESTS = "python3 -m pytest -p no:benchmark -W default -q"
FIRST = ("profile_eager", "profile_compiled", "step_compiled")
NEXT = ("step_features", "lengths_grid", "lengths", "data_features", "kernels", "step_channels_last", "data", "growth")
PROFILES = tuple(f"profile_{name}" for name in ("features", "small", "large", "shared", "shallow", "float32"))
# Tests that compare a run with itself, whatever the device.
OWN_TESTS = (
    "tests/test_switches.py tests/callbacks/test_guards.py tests/callbacks/test_ema.py tests/callbacks/test_resume.py "
    "tests/callbacks/test_stacking.py tests/callbacks/test_checkpointing.py tests/lightning_modules"
)
NOISE = (
    "from pathlib import Path; from experiments.bench.noise import write_noise; "
    "from experiments.bench.random_teacher import save_random_teacher; folder = Path('gpu_results/ddp'); "
    "(folder / 'LibriSpeech').exists() or (write_noise(folder, 80, 15.0), save_random_teacher(folder / 'teacher'))"
)
# Options of a growing run in the folder $D; a shell variable in the commands keeps them short.
FIT = (
    "--config interleave_equal --runs_dir $D/runs --ckpt_path last --data.root $D/LibriSpeech --data.cache_dir $D "
    "--data.train_splits [train-clean-100] --data.val_splits [] --data.batch_size 16 --data.batches_per_epoch 5 "
    "--model.teacher.init_args.model $D/teacher --growth.verify true --wandb.mode disabled --log_samples false "
    "--trainer.enable_progress_bar false --trainer.max_epochs 4 --trainer.devices 1"
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
            "what the machine is, whether a step runs at all, the steps that decide, and the tests of the GPU",
            "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv; df -h /dev/shm /tmp; nproc; "
            f'timeout 100 {BENCH} profile --accelerator gpu --batch_size 8 --rounds 3 --output "$OUT/first.json" || '
            f"exit 1; {_suite(FIRST, 'L-290')}; timeout -s INT -k 15 190 {TESTS} -n 5 --dist worksteal --timeout 150 "
            'tests/gpu --ignore tests/gpu/test_processes.py --device cuda 2>&1 | tee "$OUT/tests_gpu.log"',
        ),
        Command(
            "several processes on the GPU, and whole runs that decide",
            f"timeout -s INT -k 15 110 {TESTS} --timeout 100 tests/gpu/test_processes.py --device cuda 2>&1 | "
            f'tee "$OUT/tests_processes.log" | tail -n 40; {_suite(("compare",), "L-130")}',
            repeat=True,
        ),
        Command("more steps, lengths, kernels, reading and growth", _suite(NEXT, "L-20"), repeat=True),
        Command("DDP: one process over NCCL, and the same again, which is resumed; two over gloo on one GPU", _ddp()),
        Command("profiles of other steps", _suite(PROFILES, "L-20"), repeat=True),
        Command(
            "the repository's own tests, with runs on the GPU (what fails is to be read: not all of it is wrong)",
            f"timeout -s INT -k 15 $L {TESTS} -p tests.on_gpu --device cuda -n 6 --timeout 120 -m 'not slow' "
            f'--ignore tests/lightning_modules/superb {OWN_TESTS} 2>&1 | tee "$OUT/tests_own.log" | tail -n 60',
        ),
        Command(
            "a short study: corpus, teacher, three students",
            f"{study} --only '[full_l2l,interleave_equal,midas_equal]' 2>&1 | tail -n 25; {pack}",
            repeat=True,
        ),
    ]


def _suite(parts: Sequence[str], seconds: str) -> str:
    """Run parts of the suite for so many seconds; ``L`` is the limit of the command."""
    call = f"{BENCH} suite --accelerator gpu --output gpu_results/suite --only '{json.dumps(parts)}'"
    return f"{KEEP}timeout -k 15 $L {call} --budget $(({seconds})) 2>&1 | tail -n 60; kill $K; wait $K; keep"


def _ddp() -> str:
    start, fit = "python3 -m torch.distributed.run --nproc_per_node 1", "-m experiments.cli fit $F"
    # The first run ends early, so that the second has something to resume.
    one = f"timeout 100 {start} --standalone {fit} --name nccl --trainer.strategy ddp $M"
    two = (
        f'timeout 200 {start} --nnodes 2 --node_rank "$n" --rdzv_backend c10d --rdzv_endpoint localhost:29500 '
        f"{fit} --name gloo --trainer.num_nodes 2 --trainer.strategy "
        "lightning.pytorch.strategies.DDPStrategy --trainer.strategy.process_group_backend gloo"
    )
    return (
        f'set -f; D=gpu_results/ddp; F="{FIT}"; python3 -c "{NOISE}"; M="--trainer.max_time 00:00:00:03"; '
        f'for i in 1 2; do {one} > "$OUT/nccl_$i.log" 2>&1; M=; done; '
        f'for n in 0 1; do {two} > "$OUT/gloo_$n.log" 2>&1 & done; wait; set +f; tail -n 20 "$OUT"/*_?.log'
    )
