"""Conversion of models in place: every norm that is recognised becomes ours, and back.

A module keeps its identity and only its class changes. Its parameters, buffers, hooks, name, flags and ``state_dict``
are therefore untouched, a module used in two places is still one module, and whoever holds a reference to it (an
optimizer, a list, a hook) still holds the right one. ``nn.LayerNorm`` and ``nn.RMSNorm`` take the classes of
``modules.py``, which are made for their attributes. Any other class takes a subclass of itself, so that ``isinstance``
and its own methods keep working, whose forward is ours; and only after it has been run beside ours and agreed.
"""

import copy
import inspect
import itertools
import math
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import functional
from .modules import LayerNorm, RMSNorm, one_plus

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
_HALF = (torch.float16, torch.bfloat16)
_LONGEST_PROBE = 2**20
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 0.0)  # for classes that write it into their forward
_LEADING = ((6,), (2, 3), (1, 6), (1, 2, 3), (1, 2, 1, 3))  # dimensions before a row's
_CONTAINERS = (list, dict, set, deque)
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_BEFORE = "_layernorm_cuda_before"
_FAST_PATH = (
    "in inference the fast path of nn.TransformerEncoderLayer reads its parameters and runs PyTorch's own kernel; "
    "torch.backends.mha.set_fastpath_enabled(False) lets this one run"
)


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace_norms` or :func:`restore_norms` did with one module, and why."""

    name: str
    before: type
    after: type
    replaced: bool
    reason: str = ""

    def __str__(self) -> str:
        before, after = (f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in (self.before, self.after))
        change = f"{before} -> {after}" if self.replaced else f"{before} left alone"
        return f"{self.name or '(the model)'}: {change}" + (f" ({self.reason})" if self.reason else "")


def replace_norms(model: nn.Module) -> list[Replacement]:
    """Makes every norm in ``model`` that is recognised one of ours, in place.

    ``nn.LayerNorm`` and ``nn.RMSNorm`` always; any other module without children whose parameters are at most a weight
    and a bias if, on probes in float32, float16 and bfloat16, it computes what ours computes, gradients included:
    the transformers' norms (T5, Llama, Mistral, Qwen, Gemma, ...), Apex's, Liger's and your own. Parameters, buffers,
    hooks, flags and ``state_dict`` stay what and where they are.

    To find out, its own forward is run on a copy of it, on inputs of one to four dimensions before those of a row. It
    counts what its attributes are now: eps and parameters may change later, what else forward asks for may not.

    Returns one :class:`Replacement` for each module replaced, and for each that looks like a norm and was left alone
    (``replaced=False``) with the reason. A module under several names is listed under its first.
    """
    encoder_layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    in_fast_path = {id(norm) for layer in encoder_layers for norm in layer.children()}
    report, recognised = [], {}
    for name, module in list(model.named_modules()):
        if not _looks_like_a_norm(name, module):
            continue
        before = type(module)
        after, reason = _counterpart(module, recognised)
        if after is not None:
            try:
                module.__class__ = after
            except TypeError as error:
                after, reason = None, f"Python does not let its class change: {error}"
            else:
                module.__dict__[_BEFORE] = before
                reason = _FAST_PATH if id(module) in in_fast_path else ""
        report.append(Replacement(name, before, type(module), after is not None, reason))
    return report


def restore_norms(model: nn.Module) -> list[Replacement]:
    """Gives every module that :func:`replace_norms` replaced in ``model`` its own class back.

    Returns one :class:`Replacement` for each; norms of ours that were not put there by it are left alone.
    """
    report = []
    for name, module in model.named_modules():
        ours = type(module)
        before = module.__dict__.get(_BEFORE)
        if before is None:
            if isinstance(module, (LayerNorm, RMSNorm)):
                report.append(Replacement(name, ours, ours, False, "not put here by replace_norms"))
        elif "forward" in vars(module):
            report.append(
                Replacement(name, ours, ours, False, "its forward was replaced on the instance; undo that first")
            )
        elif ours in (LayerNorm, RMSNorm) or "recipe" in vars(ours):
            module.__class__ = before
            del module.__dict__[_BEFORE]
            report.append(Replacement(name, ours, before, True))
        else:
            report.append(Replacement(name, ours, ours, False, "its class was changed again since; undo that first"))
    return report


# ---- recognising a norm ---------------------------------------------------------------------------------------------


def _looks_like_a_norm(name: str, module: nn.Module) -> bool:
    if "parametrizations" in name.split(".") or (any(module.children()) and not parametrize.is_parametrized(module)):
        return False
    kind = getattr(module, "original_name", type(module).__name__)  # TorchScript's name for what it compiled
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "norm" in kind.lower() or bool(_eps_names(module))


def _eps_names(module: nn.Module) -> list[str]:
    kinds = (int, float, type(None))  # None: nn.RMSNorm's default
    return [name for name, value in vars(module).items() if type(value) in kinds and re.search("(^|_)eps", name)]


def _counterpart(module: nn.Module, recognised: dict) -> tuple[type | None, str]:
    """The class to give the module, or None and the reason why it stays what it is.

    ``recognised`` remembers what was found for modules that differ in nothing but the values of their tensors.
    """
    kind = type(module)
    if isinstance(module, (LayerNorm, RMSNorm, Converted)):
        return None, "already ours"
    if isinstance(module, torch.jit.ScriptModule):
        return None, "compiled by TorchScript"
    if parametrize.is_parametrized(module):
        return None, "its parameters are computed by torch.nn.utils.parametrize; replace first, then parametrize"
    if "forward" in vars(module):
        return None, "its forward was replaced on the instance"
    if kind is nn.LayerNorm:
        return LayerNorm, ""
    if kind is nn.RMSNorm:
        return RMSNorm, ""
    if any(map(is_lazy, _tensors(module).values())):
        return None, "its parameters are not initialised yet"
    # A long tensor's repr leaves out most of it: what is not plain is equal to itself alone.
    own = {name: value if _is_plain(value) else id(value) for name, value in _own_attributes(module).items()}
    tensors = [(name, t.shape, t.device) for name, t in _tensors(module).items()]
    key = repr((id(kind), own, tensors))
    if key not in recognised:
        try:
            recognised[key] = _recognise(module)
        except Exception as error:  # under a mode of PyTorch's in which values cannot be looked at
            recognised[key] = None, f"could not be tried here: {type(error).__name__}"
    recipe, reason = recognised[key]
    return (None, reason) if recipe is None else (_converted(kind, recipe), "")


def _own_attributes(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _normalized_shape(module: nn.Module, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    shape = getattr(module, "normalized_shape", otherwise)
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _row(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a row under parameters of ``shape``: [1, H] says no more than [H]."""
    return shape[next((i for i, size in enumerate(shape) if size != 1), len(shape) - 1) :]


@dataclass(frozen=True)
class Recipe:
    """How to compute what a foreign norm computes, from its own attributes."""

    rms: bool
    weight: str | None
    bias: str | None
    eps: str | float
    zero_centered: bool
    dims: int  # of a row
    output: str = "input"  # a key of _OUTPUT_DTYPES
    autocast: bool = True  # whether the output's dtype is the same under CUDA autocast; if not, theirs runs there

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        weight = None if self.weight is None else getattr(module, self.weight)
        bias = None if self.bias is None else getattr(module, self.bias)
        params = weight if weight is not None else bias
        shape = _normalized_shape(module, x.shape[-1:]) if params is None else params.shape[-self.dims :]
        weight, bias = (t if t is None or t.dim() == self.dims else t.reshape(shape) for t in (weight, bias))
        dtype = x.dtype if params is None else _OUTPUT_DTYPES[self.output](x.dtype, params.dtype)
        scale = one_plus(weight) if self.zero_centered else weight
        return functional.norm_to(dtype, x, shape, scale, bias, self.eps_of(module), self.rms)

    def eps_of(self, module: nn.Module) -> float | None:
        return getattr(module, self.eps) if isinstance(self.eps, str) else self.eps


def _weight_if_half(x: torch.dtype, weight: torch.dtype) -> torch.dtype:
    return weight if weight in _HALF else torch.promote_types(x, weight)


# The dtype of a foreign norm's output, from those of its input and weight: LayerNorm and Gemma's, Llama's, T5's.
_OUTPUT_DTYPES: dict[str, Callable[[torch.dtype, torch.dtype], torch.dtype]] = {
    "input": lambda x, weight: x,
    "promoted": torch.promote_types,
    "weight": _weight_if_half,
}


class Converted:
    """A foreign norm whose forward is ours; the subclasses have a ``recipe`` and forward's name for its input."""

    recipe: Recipe
    input_name: str

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        if len(args) + len(named) != 1 or (named and self.input_name not in named):
            inspect.signature(super().forward).bind(*args, **named)  # raises what a call of theirs would
        (x,) = (*args, *named.values())
        if isinstance(x, torch.fx.Proxy):
            return super().forward(x)
        if not self.recipe.autocast and x.is_cuda and torch.is_autocast_enabled("cuda"):
            return super().forward(x)
        return self.recipe(self, x)

    def __reduce_ex__(self, protocol):
        if "recipe" not in vars(type(self)):  # its class was changed again since
            return super().__reduce_ex__(protocol)
        # The subclass was made at run time: pickle and deepcopy make it again.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _new_converted, (self.__dict__[_BEFORE], self.recipe), state


@cache
def _converted(kind: type, recipe: Recipe) -> type:
    input_name = list(inspect.signature(kind.forward).parameters)[1]
    attributes = {"recipe": recipe, "input_name": input_name, "__doc__": kind.__doc__}
    return type(f"Fused{kind.__name__}", (Converted, kind), attributes)


def _new_converted(kind: type, recipe: Recipe) -> nn.Module:
    cls = _converted(kind, recipe)
    return cls.__new__(cls)


def _recognise(module: nn.Module) -> tuple[Recipe | None, str]:
    """The recipe by which ours agrees with the module in value, gradient and dtype, or the reason why none does."""
    arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(arguments) != 1 or arguments[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY):
        return None, "its forward takes more than the input"
    tensors = _tensors(module)
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(tensors) > 2 or len(shapes) > 1:
        return None, f"has more than a weight and a bias of one shape: {', '.join(tensors)}"
    own = shapes.pop() if shapes else _normalized_shape(module, (24,))
    if not own or math.prod(own) == 0:
        return None, "its parameters have no elements to normalise over"
    if math.prod(own) > _LONGEST_PROBE:
        return None, f"its parameters have more than {_LONGEST_PROBE} elements, which is too much to try"
    shape = _row(own)
    if 1 in shape:
        return None, f"its parameters, of shape {own}, may be meant for rows of more elements than they have"

    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    probe = _Probe(module, shape, torch.device("cpu") if device.type == "meta" else device)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(probe.device.type, enabled=False),
        torch.random.fork_rng([probe.device] if probe.device.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            probe.theirs(probe.rows(1.0))
        except Exception as error:
            return None, f"fails on an input of shape {(6, *shape)}: {type(error).__name__}"
        names, parameters = [*tensors, None], module._parameters.keys() & tensors.keys()
        for eps in _eps_names(module) or _USUAL_EPS:
            for rms, weight, bias in itertools.product((True, False), names, names):
                if not parameters <= {weight, bias}:
                    continue  # a buffer may lie unused
                for zero_centered in (False, True) if weight else (False,):
                    recipe = Recipe(rms, weight, bias, eps, zero_centered, len(shape))
                    if probe.agrees(recipe, torch.float32):
                        return probe.confirm(recipe)
    return None, "computes something else than layer or RMS normalisation of each row"


class _Probe:
    """Runs a module's forward, and ours, on a copy of it that has parameters of the probe's own.

    The copy shares nothing that forward could change, and no hook of the module runs.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], device: torch.device):
        self.module, self.shape, self.device = module, shape, device
        random = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:  # whatever the default dtype and device are here
            return torch.randn(*size, generator=random, dtype=torch.float32, device="cpu").to(device)

        self.tensors = {name: draw(*t.shape) / 4 + 0.75 for name, t in _tensors(module).items()}
        self.noise = draw(6, *shape)
        self.changed: set[str] = set()  # attributes that forward has set

    def rows(self, eps: float | None) -> Tensor:
        """Six rows: with means away from 0, some large, and some so small that eps decides."""
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        scale = torch.tensor([1.0, 1.0, 30.0, 2.0, 0.5, 0.1], dtype=torch.float32, device=self.device)
        scale[3:] *= math.sqrt(eps) if eps > 0 else 1e-3
        return (self.noise + 0.5) * scale.reshape(-1, *[1] * len(self.shape))

    def _copy(self, tensors, training):
        twin = object.__new__(type(self.module))
        missing = dict.fromkeys([*self.module._parameters, *self.module._buffers])
        twin.__dict__.update(vars(self.module))
        own = _own_attributes(self.module).items()
        twin.__dict__.update({name: copy.copy(value) for name, value in own if isinstance(value, _CONTAINERS)})
        twin.__dict__.update(_parameters={**missing, **tensors}, _buffers={}, training=training)
        return twin

    def _run(self, forward, x, dtype, training):
        """(output, gradients of the input and of the parameters)"""
        tensors = {name: t.to(dtype, copy=True).requires_grad_() for name, t in self.tensors.items()}
        twin = self._copy(tensors, training)
        x, before = x.clone().requires_grad_(), dict(vars(twin))
        sizes = {name: len(value) for name, value in before.items() if isinstance(value, _CONTAINERS)}
        output = forward(twin, x)
        for name, value in vars(twin).items():
            if value is not before.get(name, twin) or (name in sizes and len(value) != sizes[name]):
                self.changed.add(name)
        if not output.requires_grad or output.shape != x.shape:
            return output, ()
        upstream = self.noise.flip(0).reshape(x.shape).to(output.dtype)
        return output, torch.autograd.grad(output, [x, *tensors.values()], upstream, allow_unused=True)

    def theirs(self, x, dtype=torch.float32, training=False):
        return self._run(type(self.module).forward, x, dtype, training)

    def agrees(self, recipe: Recipe, x_dtype, dtype=torch.float32, leading=(6,), training=False) -> bool:
        """Whether value, dtype and gradients agree where theirs works at all."""
        eps = recipe.eps_of(self.module)
        if eps is None and not recipe.rms:
            return False
        x = self.rows(eps).reshape(*leading, *self.shape).to(x_dtype)
        try:
            theirs, their_grads = self.theirs(x, dtype, training)
        except Exception:
            return dtype != torch.float32 or x_dtype != torch.float32
        ours, our_grads = self._run(recipe, x, dtype, training)
        narrow = max((x_dtype, dtype, theirs.dtype), key=_TOLERANCE.__getitem__)
        if not self._close(ours, theirs, narrow):
            return False
        if narrow is not torch.float32:
            return True
        return len(our_grads) == len(their_grads) and all(
            map(self._close, our_grads, their_grads, itertools.repeat(narrow))
        )

    def _close(self, a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> bool:
        """Same shape and dtype, and elementwise to ``dtype``'s tolerance relative to the largest element of the row."""
        if a is None or b is None:
            return a is b
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = a.double(), b.double()
        largest = b.abs().amax(tuple(range(-len(self.shape), 0)), keepdim=True)
        return bool(((a - b).abs() <= _TOLERANCE[dtype] * largest).all())

    def confirm(self, recipe: Recipe) -> tuple[Recipe | None, str]:
        """The recipe with the rule of its output's dtype, if it holds for all ranks tried, modes and dtypes."""
        for leading, training in itertools.product(_LEADING, (False, True)):
            if not self.agrees(recipe, torch.float32, leading=leading, training=training):
                mode = "training" if training else "inference"
                return None, f"differs from ours on an input of shape {(*leading, *self.shape)} in {mode}"
        if self.changed:
            return None, f"its forward changes attributes: {', '.join(sorted(self.changed))}"
        for rule in _OUTPUT_DTYPES:
            known = replace(recipe, output=rule)
            if all(self.agrees(known, x, weight) for x in _DTYPES for weight in _DTYPES):
                break
        else:
            return None, "agrees in float32, but not in value or dtype of the output in float16 and bfloat16"
        if self.device.type in ("cpu", "cuda"):
            with torch.autocast(self.device.type, torch.bfloat16):
                if not self.agrees(known, torch.float32):
                    return None, "differs from ours under autocast"
        return replace(known, autocast=self._same_under_cuda_autocast(known)), ""

    def _same_under_cuda_autocast(self, recipe: Recipe) -> bool:
        """Whether theirs gives outputs of the recipe's dtype there. Tensors without data show it, on any machine."""
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        try:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            with FakeTensorMode():
                return all(self._same_dtype(recipe, x, weight) for x in _DTYPES for weight in _DTYPES)
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", dtype)

    def _same_dtype(self, recipe: Recipe, x_dtype: torch.dtype, dtype: torch.dtype) -> bool:
        expected = _OUTPUT_DTYPES[recipe.output](x_dtype, dtype) if self.tensors else x_dtype
        try:
            tensors = {name: torch.empty(t.shape, dtype=dtype, device="cuda") for name, t in self.tensors.items()}
            x = torch.empty(6, *self.shape, dtype=x_dtype, device="cuda")
            return type(self.module).forward(self._copy(tensors, False), x).dtype == expected
        except Exception:
            return True  # nor does it run there


# ---- direct calls ---------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_depth = 0
_native = ()


@contextmanager
def override():
    """Inside ``with override():`` torch.nn.functional's ``layer_norm`` and ``rms_norm`` are ours.

    That reaches whatever looks them up there when it runs, ``nn.LayerNorm`` included, and not a name that was imported
    from there before. It holds for every thread of the process while at least one is inside; contexts may nest, and
    leave in any order. Also a decorator: ``@override()``.
    """
    global _depth, _native
    torch_functions = torch.nn.functional
    with _lock:
        if _depth == 0:
            _native = torch_functions.layer_norm, torch_functions.rms_norm
            torch_functions.layer_norm, torch_functions.rms_norm = functional.layer_norm, functional.rms_norm
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                torch_functions.layer_norm, torch_functions.rms_norm = _native
