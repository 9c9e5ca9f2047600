"""Growth policies, which choose the source layer of each layer of the deeper student.

A policy is a pure function from (depth, target) to a plan. A plan lists, for each new position, the 0-based
index of the current layer that it comes from, or ``None`` for a fresh layer. The first position that names a
layer keeps that same module and its optimizer state; every further one gets a clone. Every current layer
appears in every plan.

``interleaved`` is the paper's policy ("Fast Speech Foundation Model Distillation Using Interleaved Stacking",
arXiv 2606.11766). The others are the baselines of earlier work: StackBERT, GradStack, MIDAS, LIDAS, G_stack.

A policy of your own::

    @register_policy("on_top")
    def on_top(depth: int, target: int) -> LayerPlan:
        return [*range(depth), *[depth - 1] * (target - depth)]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from datamodules.errors import InputError
from lightning_modules.lookup import find_named

LayerPlan = list[int | None]
Initialise = Literal["copy", "zero_output"]
Offset = Literal["last", "first"]


def adding(first: int, num_layers: int) -> list[int]:
    """Depths of stages that add as many layers at each growth as the first stage has."""
    return list(range(first, num_layers + first, first))


def doubling(first: int, num_layers: int) -> list[int]:
    """Depths of stages that double the student at each growth."""
    stages = [first]
    while stages[-1] < num_layers:
        stages.append(2 * stages[-1])
    return stages


def once(first: int, num_layers: int) -> list[int]:
    """Depths of two stages, with one growth between them."""
    return [first, num_layers]


@dataclass(frozen=True)
class Policy:
    """A named policy.

    Attributes:
        name: name of the policy in configurations.
        plan: function (depth, target) -> plan; with ``has_offset`` the offset is a third argument.
        initialise: initial values of new layers with a source: ``copy`` of it, or ``zero_output`` (a copy whose
            attention and feed-forward output projections are zero). Layers without a source are drawn at random.
        has_offset: whether the phase of the stride can be chosen.
        stages: function (K, number of layers) -> depth of each stage, from K layers on; the last depth is the number of
            layers, or the first one above it where none fits.
    """

    name: str
    plan: Callable[..., LayerPlan]
    initialise: Initialise = "copy"
    has_offset: bool = False
    stages: Callable[[int, int], list[int]] = adding


POLICIES: dict[str, Policy] = {}


def register_policy(
    name: str,
    initialise: Initialise = "copy",
    has_offset: bool = False,
    stages: Callable[[int, int], list[int]] = adding,
) -> Callable[[Callable[..., LayerPlan]], Callable[..., LayerPlan]]:
    """Decorator that makes a plan function available under ``name``.

    Raises:
        InputError: the name is taken.
    """

    def register(plan: Callable[..., LayerPlan]) -> Callable[..., LayerPlan]:
        if name in POLICIES:
            raise InputError(f"there is a policy named {name!r} already: choose another name")
        POLICIES[name] = Policy(name, plan, initialise, has_offset, stages)
        return plan

    return register


def get_policy(name: str) -> Policy:
    """The policy with this name, or the plan function at this dotted path (``my_module.my_plan``).

    Raises:
        InputError: there is no such policy; the message lists the known names.
    """
    found = find_named(name, POLICIES, "policy", "a plan function, my_module.my_plan")
    return found if isinstance(found, Policy) else Policy(name, found)


def make_plan(policy: str, depth: int, target: int, offset: Offset = "last", group: int = 1) -> LayerPlan:
    """Make the plan that grows ``depth`` layers to ``target``.

    With a ``group`` of layers that stay together, such as two that share an attention map, the policy's plan is one of
    groups: a group that it names is there with all its layers, in their order. ``interleaved`` makes 0 1 0 1 2 3 2 3 of
    4 layers in groups of 2, and 0 0 1 1 2 2 3 3 of single ones.

    Args:
        policy: a name in ``POLICIES``.
        depth: current number of layers, at least 1.
        target: number of layers after the growth, above ``depth``.
        offset: phase of the stride of ``interleaved`` and ``identity``, which clone the ``last`` or the ``first``
            layer of each group of b layers.
        group: number of layers that stay together; both depths are multiples of it.

    Raises:
        InputError: the policy or offset is unknown, the policy has no offset, or the numbers do not fit the
            policy; the message names numbers that would fit.
    """
    if group > 1:
        return _plan_of_groups(policy, depth, target, offset, group)
    chosen = get_policy(policy)
    if depth < 1 or target <= depth:
        raise InputError(
            f"{policy} cannot grow {depth} -> {target} layers: a student has at least 1 layer, and a target "
            f"must be above its depth, {max(depth, 1) + 1} or more"
        )
    if offset not in ("last", "first"):
        raise InputError(f"growth.offset is {offset!r}: it must be 'last' or 'first'")
    if offset != "last" and not chosen.has_offset:
        strided = ", ".join(sorted(p.name for p in POLICIES.values() if p.has_offset))
        raise InputError(f"{policy} has no offset: remove growth.offset={offset} (only {strided} can have it)")
    plan = chosen.plan(depth, target, offset) if chosen.has_offset else chosen.plan(depth, target)
    if len(plan) != target:
        raise InputError(f"{policy} made {len(plan)} layers of {depth} where {target} were requested")
    kept_positions(plan, depth)
    return plan


def _plan_of_groups(policy: str, depth: int, target: int, offset: Offset, group: int) -> LayerPlan:
    together = f"the student's layers stay together in groups of {group}, which share an attention map"
    if depth % group or target % group:
        raise InputError(
            f"{policy} cannot grow {depth} -> {target} layers, since {together}: choose depths that are multiples of "
            f"{group} with growth.stages or growth.layers_per_stage"
        )
    try:
        plan = make_plan(policy, depth // group, target // group, offset)
    except InputError as error:
        raise InputError(f"{error} (counted in groups, since {together})") from error
    return [None if source is None else source * group + place for source in plan for place in range(group)]


def compose_ancestry(ancestry: Sequence[int | None], plan: Sequence[int | None]) -> list[int | None]:
    """The first-stage layer that each new layer descends from; ``None`` where that is a fresh one."""
    return [None if source is None else ancestry[source] for source in plan]


def kept_positions(plan: Sequence[int | None], depth: int) -> list[int]:
    """New position of each of the ``depth`` old layers, which is the first position that names it.

    Raises:
        InputError: the plan loses a layer, or names one that does not exist.
    """
    named = {source for source in plan if source is not None}
    if named != set(range(depth)):
        raise InputError(
            f"the plan {list(plan)} names the layers {sorted(named)}; it must name every layer from 0 to "
            f"{depth - 1} "
            "and no other"
        )
    return [list(plan).index(layer) for layer in range(depth)]


def default_stages(policy: str, num_layers: int = 12, layers_per_stage: int = 3) -> tuple[int, ...]:
    """Depth of every stage: (3, 6, 9, 12), for ``stackbert`` (3, 6, 12), for ``one_shot_*`` (3, 12).

    Args:
        policy: a name in ``POLICIES``.
        num_layers: depth of the last stage.
        layers_per_stage: K, the depth of the first stage and, unless the policy defines another, the number of
            layers that every growth adds.

    Raises:
        InputError: the policy is unknown, or its depths do not lead from ``layers_per_stage`` to ``num_layers``.
    """
    chosen = get_policy(policy)
    if not 1 <= layers_per_stage < num_layers:
        raise InputError(
            f"growth.layers_per_stage={layers_per_stage} leaves nothing to grow: it must be from 1 to "
            f"{num_layers - 1}, below model.student.num_layers={num_layers}"
        )
    stages = chosen.stages(layers_per_stage, num_layers)
    if stages[-1] != num_layers:
        fitting = [str(depth) for depth in stages[-2:] if depth > layers_per_stage]
        raise InputError(
            f"{policy} with growth.layers_per_stage={layers_per_stage} goes through the depths "
            f"{', '.join(map(str, stages))}, not model.student.num_layers={num_layers}: "
            f"{' or '.join(fitting)} would fit"
        )
    return tuple(stages)


def _require(fits: bool, policy: str, depth: int, target: int, needs: str, targets: Sequence[int]) -> None:
    if not fits:
        raise InputError(
            f"{policy} cannot grow {depth} -> {target} layers, K = {target - depth}: it needs {needs}; "
            f"from {depth} layers the targets {', '.join(map(str, targets))} fit"
        )


def _require_divisible(policy: str, depth: int, target: int) -> None:
    fitting = [depth + added for added in range(1, depth + 1) if depth % added == 0]
    _require(target in fitting, policy, depth, target, "a depth divisible by K", fitting)


def _require_at_most_double(policy: str, depth: int, target: int) -> None:
    fitting = range(depth + 1, 2 * depth + 1)
    _require(target in fitting, policy, depth, target, "K <= depth", fitting)


def _clone_strided(depth: int, target: int, offset: Offset) -> LayerPlan:
    """Clone one layer in every ``depth / K``, each clone right after its original."""
    stride = depth // (target - depth)
    phase = stride - 1 if offset == "last" else 0
    return [layer for layer in range(depth) for _ in range(2 if layer % stride == phase else 1)]


@register_policy("interleaved", has_offset=True)
def interleaved(depth: int, target: int, offset: Offset = "last") -> LayerPlan:
    """InterleaveStack: spread K clones evenly, so that every layer keeps its relative depth."""
    _require_divisible("interleaved", depth, target)
    return _clone_strided(depth, target, offset)


@register_policy("gradual")
def gradual(depth: int, target: int) -> LayerPlan:
    """GradStack: repeat the last K layers on top."""
    _require_at_most_double("gradual", depth, target)
    return [*range(depth), *range(2 * depth - target, depth)]


@register_policy("midas")
def midas(depth: int, target: int) -> LayerPlan:
    """MIDAS: repeat block ceil(n / 2) of n = depth / K blocks right after itself."""
    _require_divisible("midas", depth, target)
    added = target - depth
    end = (depth // added + 1) // 2 * added
    return [*range(end), *range(end - added, depth)]


@register_policy("lidas")
def lidas(depth: int, target: int) -> LayerPlan:
    """LIDAS: repeat the exact middle K layers right after themselves; their start is rounded down."""
    _require_at_most_double("lidas", depth, target)
    added = target - depth
    start = (depth - added) // 2
    return [*range(start + added), *range(start, depth)]


@register_policy("stackbert", stages=doubling)
def stackbert(depth: int, target: int) -> LayerPlan:
    """StackBERT: repeat the whole stack on top."""
    _require(target == 2 * depth, "stackbert", depth, target, "target = 2 x depth", [2 * depth])
    return [*range(depth), *range(depth)]


@register_policy("one_shot_stack", stages=once)
def one_shot_stack(depth: int, target: int) -> LayerPlan:
    """G_stack: repeat the whole stack target / depth times, in one growth."""
    _require_multiple("one_shot_stack", depth, target)
    return [*range(depth)] * (target // depth)


@register_policy("one_shot_interleave", stages=once)
def one_shot_interleave(depth: int, target: int) -> LayerPlan:
    """Repeat every layer target / depth times in a row, in one growth."""
    _require_multiple("one_shot_interleave", depth, target)
    return [layer for layer in range(depth) for _ in range(target // depth)]


def _require_multiple(policy: str, depth: int, target: int) -> None:
    below, needs = target // depth * depth, "a target divisible by depth"
    fitting = [multiple for multiple in (below, below + depth) if multiple > depth]
    _require(target % depth == 0, policy, depth, target, needs, fitting)


@register_policy("random")
def random(depth: int, target: int) -> LayerPlan:
    """Control condition: add K fresh layers on top."""
    return [*range(depth), *[None] * (target - depth)]


@register_policy("identity", initialise="zero_output", has_offset=True)
def identity(depth: int, target: int, offset: Offset = "last") -> LayerPlan:
    """Insert layers whose output projections start at zero, at the positions of the clones of ``interleaved``.

    HuBERT normalises after each residual sum, so even these layers change the model's output a little.
    """
    _require_divisible("identity", depth, target)
    return _clone_strided(depth, target, offset)
