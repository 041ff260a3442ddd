"""Layer-normalised recurrent networks (Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450, equations 20 to 31).

Arguments, gate order and state shapes are ``torch.nn``'s. The norms' own biases stand for the paper's separate one.
What does not depend on the state, the normalised projection of the input, is computed once for a whole sequence.
"""

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .modules import LayerNorm


class _Cell(nn.Module):
    """What the cells share: two projections to ``gates * hidden_size``, and a state of zeros where none is given."""

    gates: int

    def __init__(self, input_size: int, hidden_size: int, bias: bool, device, dtype):
        super().__init__()
        if hidden_size <= 0:
            raise ValueError("hidden_size must be greater than zero")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.weight_ih = nn.Parameter(torch.empty(self.gates * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * hidden_size, hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Weights as in ``torch.nn``: uniform within ``1 / sqrt(hidden_size)``; the norms start as ones and zeros."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight_ih, -bound, bound)
        nn.init.uniform_(self.weight_hh, -bound, bound)
        for norm in self.children():
            norm.reset_parameters()

    def _check(self, input: Tensor, *states: Tensor) -> None:
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"{name}: input has {input.shape[-1]} features, expected input_size={self.input_size}")
        expected = (*input.shape[:-1], self.hidden_size)
        for state in states:
            if tuple(state.shape) != expected:
                raise RuntimeError(f"{name}: a state has shape {tuple(state.shape)}, expected {expected}")

    def _zeros(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.hidden_size)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


class LayerNormLSTMCell(_Cell):
    """An LSTM cell with layer norm on both projections and on the cell state; as :class:`torch.nn.LSTMCell`.

    ``i, f, g, o = norm_ih(W_ih x) + norm_hh(W_hh h)``, ``c' = sigmoid(f) * c + sigmoid(i) * tanh(g)``,
    ``h' = sigmoid(o) * tanh(norm_c(c'))``.

    Shape: input ``[N, input_size]`` or ``[input_size]``; ``h`` and ``c`` ``[N, hidden_size]`` or ``[hidden_size]``,
    zeros where not given. Returns ``(h', c')``.
    """

    gates = 4

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None, *, eps=1e-5):
        super().__init__(input_size, hidden_size, bias, device, dtype)
        arguments = dict(eps=eps, bias=bias, device=device, dtype=dtype)
        self.norm_ih = LayerNorm(4 * hidden_size, **arguments)
        self.norm_hh = LayerNorm(4 * hidden_size, **arguments)
        self.norm_c = LayerNorm(hidden_size, **arguments)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if hx is None:
            hx = self._zeros(input), self._zeros(input)
        self._check(input, *hx)
        return self.step(self.project(input), *hx)

    def project(self, input: Tensor) -> Tensor:
        """The input's share of the gates: ``[*, input_size]`` to ``[*, 4 * hidden_size]``."""
        return self.norm_ih(F.linear(input, self.weight_ih))

    def step(self, projected: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The next ``(h, c)`` from what :meth:`project` returned for this time."""
        i, f, g, o = (projected + self.norm_hh(F.linear(h, self.weight_hh))).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_c(c).tanh(), c


class LayerNormGRUCell(_Cell):
    """A GRU cell with layer norm on both projections, gates and candidate apart; as :class:`torch.nn.GRUCell`.

    ``r, z = norm_ih(W_i x) + norm_hh(W_h h)``, ``n = tanh(norm_in(W_in x) + sigmoid(r) * norm_hn(W_hn h))``,
    ``h' = (1 - sigmoid(z)) * n + sigmoid(z) * h``.

    Shape: input ``[N, input_size]`` or ``[input_size]``; ``h`` ``[N, hidden_size]`` or ``[hidden_size]``, zeros where
    not given. Returns ``h'``.
    """

    gates = 3

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None, *, eps=1e-5):
        super().__init__(input_size, hidden_size, bias, device, dtype)
        arguments = dict(eps=eps, bias=bias, device=device, dtype=dtype)
        self.norm_ih = LayerNorm(2 * hidden_size, **arguments)
        self.norm_hh = LayerNorm(2 * hidden_size, **arguments)
        self.norm_in = LayerNorm(hidden_size, **arguments)
        self.norm_hn = LayerNorm(hidden_size, **arguments)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = self._zeros(input) if hx is None else hx
        self._check(input, h)
        sizes = [2 * self.hidden_size, self.hidden_size]
        gates_x, new_x = F.linear(input, self.weight_ih).split(sizes, -1)
        gates_h, new_h = F.linear(h, self.weight_hh).split(sizes, -1)
        r, z = (self.norm_ih(gates_x) + self.norm_hh(gates_h)).sigmoid().chunk(2, -1)
        n = (self.norm_in(new_x) + r * self.norm_hn(new_h)).tanh()
        return n + z * (h - n)


class LayerNormLSTM(nn.Module):
    """Layers of :class:`LayerNormLSTMCell` over a sequence; arguments, inputs and states as :class:`torch.nn.LSTM`.

    Shape: input ``[T, N, input_size]`` (``[N, T, input_size]`` with ``batch_first``), ``[T, input_size]``, or a
    ``PackedSequence``; states ``[directions * num_layers, N, hidden_size]``, without ``N`` for an input without.
    Returns ``(output, (h, c))``, the output with ``directions * hidden_size`` features.
    ``cells`` holds layer 0 forward, layer 0 backward, layer 1 forward, and so on. ``proj_size`` must be 0.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        eps: float = 1e-5,
    ):
        super().__init__()
        if proj_size != 0:
            raise ValueError(f"LayerNormLSTM: proj_size={proj_size} is not supported, expected 0")
        if num_layers <= 0:
            raise ValueError("num_layers must be greater than zero")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], the probability of zeroing, got {dropout}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout acts after every layer but the last: dropout={dropout} does nothing with num_layers=1",
                stacklevel=2,
            )
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.proj_size = 0
        directions = 2 if bidirectional else 1
        sizes = [input_size] + [directions * hidden_size] * (num_layers - 1)
        self.cells = nn.ModuleList(
            LayerNormLSTMCell(size, hidden_size, bias, device, dtype, eps=eps)
            for size in sizes
            for _ in range(directions)
        )

    def reset_parameters(self) -> None:
        for cell in self.cells:
            cell.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing: there is one because :class:`torch.nn.LSTM` has one, which code calls before forward."""

    def forward(self, input, hx=None):
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LayerNormLSTM: expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 2:
            if hx is not None and any(state.dim() != 2 for state in hx):
                found = ", ".join(f"{state.dim()}D" for state in hx)
                raise RuntimeError(f"LayerNormLSTM: for unbatched 2D input h and c should be 2D too, got {found}")
            hx = None if hx is None else tuple(state.unsqueeze(1) for state in hx)
            output, (h, c) = self._run(input.unsqueeze(1), hx)
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        output, states = self._run(input.transpose(0, 1) if self.batch_first else input, hx)
        return output.transpose(0, 1) if self.batch_first else output, states

    def _packed(self, input, hx):
        padded, lengths = pad_packed_sequence(input)
        if hx is not None and input.sorted_indices is not None:
            hx = tuple(state.index_select(1, input.sorted_indices) for state in hx)
        if input.sorted_indices is not None:
            padded = padded.index_select(1, input.sorted_indices)
            lengths = lengths.index_select(0, input.sorted_indices.to(lengths.device))
        output, states = self._run(padded, hx, lengths.to(padded.device))
        packed = pack_padded_sequence(output, lengths)
        if input.unsorted_indices is not None:
            states = tuple(state.index_select(1, input.unsorted_indices) for state in states)
        return PackedSequence(packed.data, packed.batch_sizes, input.sorted_indices, input.unsorted_indices), states

    def _run(self, x: Tensor, hx, lengths: Tensor | None = None):
        """x [T, N, features]; states past a sequence's length stay what they are, its outputs there are zeros."""
        time, batch, features = x.shape
        if time == 0:
            raise RuntimeError("LayerNormLSTM: expected a sequence of at least one step, got none")
        if features != self.input_size:
            raise RuntimeError(f"LayerNormLSTM: input has {features} features, expected input_size={self.input_size}")
        expected = (len(self.cells), batch, self.hidden_size)
        if hx is None:
            hx = x.new_zeros(expected), x.new_zeros(expected)
        for name, state in zip("hc", hx, strict=True):
            if tuple(state.shape) != expected:
                raise RuntimeError(f"LayerNormLSTM: {name} has shape {tuple(state.shape)}, expected {expected}")
        steps = torch.arange(time, device=x.device)
        inside = None if lengths is None else (steps[:, None] < lengths).unsqueeze(-1)
        directions = 2 if self.bidirectional else 1
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                output, state = self._direction(self.cells[k], x, hx[0][k], hx[1][k], inside, direction == 1)
                outputs.append(output)
                last.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(states) for states in zip(*last, strict=True))

    @staticmethod
    def _direction(cell, x, h, c, inside, backwards):
        outputs = []
        projected = cell.project(x)
        order = range(x.shape[0])
        for t in reversed(order) if backwards else order:
            new_h, new_c = cell.step(projected[t], h, c)
            if inside is not None:
                new_h, new_c = torch.where(inside[t], new_h, h), torch.where(inside[t], new_c, c)
            h, c = new_h, new_c
            outputs.append(h)
        output = torch.stack(outputs[::-1] if backwards else outputs)
        return output if inside is None else output * inside, (h, c)

    def extra_repr(self) -> str:
        defaults = dict(num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False)
        changed = [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *changed])
