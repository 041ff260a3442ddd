"""The layer-normalised cells and the LSTM, against plain compositions with native's operators."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import layernorm_cuda as lnc


def plain_norm(module, x):
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def plain_lstm_step(cell, x, h, c):
    gates = plain_norm(cell.norm_ih, x @ cell.weight_ih.T) + plain_norm(cell.norm_hh, h @ cell.weight_hh.T)
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(plain_norm(cell.norm_c, c)), c


def plain_gru_step(cell, x, h):
    size = cell.hidden_size
    a, b = x @ cell.weight_ih.T, h @ cell.weight_hh.T
    gates = plain_norm(cell.norm_ih, a[..., : 2 * size]) + plain_norm(cell.norm_hh, b[..., : 2 * size])
    r, z = torch.sigmoid(gates).chunk(2, -1)
    n = torch.tanh(plain_norm(cell.norm_in, a[..., 2 * size :]) + r * plain_norm(cell.norm_hn, b[..., 2 * size :]))
    return (1 - z) * n + z * h


def plain_lstm(lstm, x, h0, c0):
    """x [T, N, features]; one sequence position at a time."""
    directions, hs, cs = 2 if lstm.bidirectional else 1, [], []
    for layer in range(lstm.num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            h, c, steps = h0[k], c0[k], []
            for t in range(len(x)) if direction == 0 else reversed(range(len(x))):
                h, c = plain_lstm_step(lstm.cells[k], x[t], h, c)
                steps.append(h)
            outputs.append(torch.stack(steps if direction == 0 else steps[::-1]))
            hs.append(h)
            cs.append(c)
        x = torch.cat(outputs, -1)
    return x, (torch.stack(hs), torch.stack(cs))


def jitter(module):
    """Parameters that are all different, so that none can stand for another."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) / 4)
    return module


def agree(found, expected, parameters):
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters, upstream), torch.autograd.grad(expected, parameters, upstream)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_cells(batch, bias):
    lstm, gru = jitter(lnc.LayerNormLSTMCell(5, 7, bias)), jitter(lnc.LayerNormGRUCell(5, 7, bias))
    x, h, c = torch.randn(*batch, 5), torch.randn(*batch, 7), torch.randn(*batch, 7)
    agree(torch.cat(lstm(x, (h, c))), torch.cat(plain_lstm_step(lstm, x, h, c)), list(lstm.parameters()))
    agree(gru(x, h), plain_gru_step(gru, x, h), list(gru.parameters()))
    zeros = torch.zeros_like(h)
    torch.testing.assert_close(lstm(x), lstm(x, (zeros, zeros)))
    torch.testing.assert_close(gru(x), gru(x, zeros))


@pytest.mark.parametrize("cell", [lnc.LayerNormLSTMCell, lnc.LayerNormGRUCell])
def test_cell_derivatives(cell):
    module = jitter(cell(3, 4, dtype=torch.float64))
    x, h, c = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    if cell is lnc.LayerNormLSTMCell:
        assert torch.autograd.gradcheck(lambda x, h, c, *_: module(x, (h, c)), (x, h, c, *module.parameters()))
    else:
        assert torch.autograd.gradcheck(lambda x, h, *_: module(x, h), (x, h, *module.parameters()))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_lstm(num_layers, bidirectional):
    lstm = jitter(lnc.LayerNormLSTM(5, 6, num_layers, bidirectional=bidirectional, dtype=torch.float64))
    states = torch.randn(2, num_layers * (2 if bidirectional else 1), 3, 6, dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    output, (h, c) = lstm(x, tuple(states))
    expected, (plain_h, plain_c) = plain_lstm(lstm, x, *states)
    torch.testing.assert_close((h, c), (plain_h, plain_c))
    agree(output, expected, list(lstm.parameters()))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_shapes_are_natives(num_layers, bidirectional, batch_first):
    arguments = (5, 6, num_layers, True, batch_first, 0.0, bidirectional)
    ours, theirs = lnc.LayerNormLSTM(*arguments), nn.LSTM(*arguments)
    for shape in ((4, 3, 5), (4, 5)):
        x = torch.randn(shape)
        for hx in (None, tuple(torch.zeros_like(s) for s in theirs(x)[1])):
            output, states = ours(x, hx)
            expected, their_states = theirs(x, hx)
            assert output.shape == expected.shape
            assert [s.shape for s in states] == [s.shape for s in their_states]


def test_states_of_another_rank():
    with pytest.raises(RuntimeError, match="h and c should be 2D too, got 3D, 3D"):
        lnc.LayerNormLSTM(5, 6)(torch.randn(4, 5), (torch.zeros(1, 1, 6), torch.zeros(1, 1, 6)))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(bidirectional):
    """Each sequence gives what it gives alone, in whatever order they come."""
    lstm = jitter(lnc.LayerNormLSTM(5, 6, 2, bidirectional=bidirectional))
    sequences = [torch.randn(n, 5) for n in (2, 4, 1, 3)]
    states = torch.randn(2, 4 if bidirectional else 2, 4, 6)
    packed, (h, c) = lstm(pack_sequence(sequences, enforce_sorted=False), tuple(states))
    padded, lengths = pad_packed_sequence(packed)
    for k, sequence in enumerate(sequences):
        expected, (alone_h, alone_c) = lstm(sequence, tuple(states[:, :, k]))
        torch.testing.assert_close(padded[: lengths[k], k], expected)
        torch.testing.assert_close((h[:, k], c[:, k]), (alone_h, alone_c))
    native, _ = nn.LSTM(5, 6, 2, bidirectional=bidirectional)(pack_sequence(sequences, enforce_sorted=False))
    assert packed.data.shape == native.data.shape
    assert torch.equal(packed.batch_sizes, native.batch_sizes)
    in_order = [sequences[k] for k in (1, 3, 0, 2)]
    torch.testing.assert_close(lstm(pack_sequence(in_order))[0].data, lstm(pack_sequence(sequences, False))[0].data)


def test_dropout():
    lstm = lnc.LayerNormLSTM(4, 32, 2, dropout=0.5)
    x = torch.randn(3, 2, 4)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    lstm.eval()
    assert torch.equal(lstm(x)[0], lstm(x)[0])
    lstm.train().dropout = 1.0
    zeros = torch.zeros(2, 32)
    below, _ = lstm._direction(lstm.cells[1], torch.zeros(3, 2, 32), zeros, zeros, None, False)
    torch.testing.assert_close(lstm(x)[0], below)
    with pytest.warns(UserWarning, match="does nothing with num_layers=1"):
        lnc.LayerNormLSTM(4, 4, dropout=0.5)


def test_compile():
    lstm = jitter(lnc.LayerNormLSTM(4, 6, bidirectional=True))
    gru = jitter(lnc.LayerNormGRUCell(4, 6))
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    agree(compiled(x)[0], lstm(x)[0], list(lstm.parameters()))
    compiled = torch.compile(gru, backend="aot_eager", fullgraph=True)
    agree(compiled(x[0]), gru(x[0]), list(gru.parameters()))


def test_dtypes():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        lstm = lnc.LayerNormLSTM(4, 16, dtype=dtype)
        output, (h, c) = lstm(torch.randn(3, 2, 4, dtype=dtype))
        assert output.dtype == h.dtype == c.dtype == dtype
        wide = lnc.LayerNormLSTM(4, 16)
        wide.load_state_dict(lstm.state_dict())
        x = torch.randn(3, 2, 4).to(dtype)
        tolerance = max(8 * torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(lstm(x)[0].float(), wide(x.float())[0], rtol=tolerance, atol=tolerance)


def test_no_scale_of_the_weights_matters():
    """What layer norm is there for: the gates do not change when all weights into them grow."""
    cell = lnc.LayerNormLSTMCell(8, 16, dtype=torch.float64)
    x, h, c = torch.randn(2, 8).double(), torch.randn(2, 16).double(), torch.randn(2, 16).double()
    before = cell(x, (h, c))
    with torch.no_grad():
        cell.weight_ih.mul_(1e3)
        cell.weight_hh.mul_(1e3)
    torch.testing.assert_close(cell(x, (h, c)), before, rtol=1e-4, atol=1e-4)


def test_module_surface():
    lstm = lnc.LayerNormLSTM(5, 6, 2, batch_first=True)
    assert repr(lstm).startswith("LayerNormLSTM(\n  5, 6, num_layers=2, batch_first=True\n")
    assert repr(lnc.LayerNormGRUCell(5, 6, bias=False)).startswith("LayerNormGRUCell(\n  5, 6, bias=False\n")
    assert all(isinstance(norm, lnc.LayerNorm) for cell in lstm.cells for norm in cell.children())
    bound = 6**-0.5
    assert all(p.abs().max() <= bound for name, p in lstm.named_parameters() if "weight_" in name)
    assert not any("bias" in name for name in lnc.LayerNormLSTM(5, 6, bias=False).state_dict())
    lstm.reset_parameters()
    lstm.flatten_parameters()
    copy = lnc.LayerNormLSTM(5, 6, 2, batch_first=True)
    copy.load_state_dict(lstm.state_dict())
    x = torch.randn(2, 3, 5)
    assert torch.equal(copy(x)[0], lstm(x)[0])


def test_errors():
    with pytest.raises(ValueError, match="proj_size=3 is not supported"):
        lnc.LayerNormLSTM(4, 6, proj_size=3)
    with pytest.raises(ValueError, match="num_layers"):
        lnc.LayerNormLSTM(4, 6, 0)
    with pytest.raises(ValueError, match="hidden_size"):
        lnc.LayerNormLSTMCell(4, 0)
    with pytest.raises(ValueError, match="dropout"):
        lnc.LayerNormLSTM(4, 6, 2, dropout=1.5)
    with pytest.raises(ValueError, match="dropout"):
        lnc.LayerNormLSTM(4, 6, 2, dropout=True)
    lstm, cell = lnc.LayerNormLSTM(4, 6), lnc.LayerNormLSTMCell(4, 6)
    with pytest.raises(RuntimeError, match="input has 5 features, expected input_size=4"):
        lstm(torch.randn(3, 2, 5))
    with pytest.raises(RuntimeError, match=r"c has shape \(1, 3, 6\), expected \(1, 2, 6\)"):
        lstm(torch.randn(3, 2, 4), (torch.randn(1, 2, 6), torch.randn(1, 3, 6)))
    with pytest.raises(RuntimeError, match="at least one step"):
        lstm(torch.randn(0, 2, 4))
    with pytest.raises(ValueError, match="2D or 3D, got 1D"):
        lstm(torch.randn(4))
    with pytest.raises(ValueError, match="1D or 2D, got 3D"):
        cell(torch.randn(3, 2, 4))
    with pytest.raises(RuntimeError, match=r"a state has shape \(2, 6\), expected \(3, 6\)"):
        cell(torch.randn(3, 4), (torch.randn(3, 6), torch.randn(2, 6)))
