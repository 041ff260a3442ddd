"""BERT, GPT-2, T5, RoBERTa and BART with our norms: the same logits, losses, gradients, training and generated text."""

import copy

import pytest
import torch

import layernorm_cuda as lnc

transformers = pytest.importorskip("transformers")

VOCAB, EOS = 97, 2
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=EOS)
ENCODER = dict(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
LENGTH = 12


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER, **IDS, max_position_embeddings=32))


def roberta():
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ENCODER, **IDS, max_position_embeddings=34))


def gpt2(layers=2):
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=48, n_layer=layers, n_head=4, **IDS)
    return transformers.GPT2LMHeadModel(config)


def t5(layers=2):
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=48, d_kv=12, d_ff=96, num_layers=layers, num_heads=4, decoder_start_token_id=0, **IDS
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    sides = dict(layers=2, attention_heads=4, ffn_dim=96)
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=48, max_position_embeddings=32, forced_eos_token_id=None, **sides, **IDS
    )
    return transformers.BartForConditionalGeneration(config)


MODELS = {"BERT": bert, "GPT-2": gpt2, "T5": t5, "RoBERTa": roberta, "BART": bart}
NORMS = {"BERT": 6, "GPT-2": 5, "T5": 12, "RoBERTa": 6, "BART": 12}
GENERATES = ["GPT-2", "T5", "BART"]


def pair(name, dtype=torch.float32):
    """The model as it is, and with our norms; every parameter random, the norms' own included."""
    theirs = MODELS[name]().to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape).to(dtype) / 10)
    ours = copy.deepcopy(theirs)
    report = lnc.replace_norms(ours)
    assert all(r.replaced for r in report), report
    assert len(report) == NORMS[name]
    return theirs, ours


def batch(seed=0, size=4):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (size, LENGTH), generator=random)
    mask = (torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (size, 1), generator=random)).long()
    mask[0] = 1
    return dict(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))


def gradients(model, **inputs):
    output = model(**inputs)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(output.loss, parameters.values())
    return output, dict(zip(parameters, grads, strict=True))


def distance(a, b):
    """The largest difference, relative to the largest element."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    theirs, ours = pair(name)
    theirs.eval(), ours.eval()
    expected, right = gradients(theirs, **batch())
    found, grads = gradients(ours, **batch())
    assert distance(found.logits, expected.logits) < 1e-5
    assert distance(found.loss, expected.loss) < 1e-5
    largest = max(g.abs().max() for g in right.values())
    for key, grad in grads.items():
        if key.endswith(("key.bias", "k_proj.bias")):
            # Softmax does not see them: 0 but for rounding, in the original as well.
            assert grad.abs().max() < 1e-5 * largest
        else:
            assert distance(grad, right[key]) < 1e-5, key


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name):
    """Agrees to bfloat16's rounding through all layers, and is as near to float32 of the same numbers as theirs."""
    theirs, ours = pair(name, torch.bfloat16)
    wide = copy.deepcopy(theirs).float()
    for model in (theirs, ours, wide):
        model.eval()
    expected, their_grads = gradients(theirs, **batch())
    found, grads = gradients(ours, **batch())
    truth, right = gradients(wide, **batch())
    assert found.logits.dtype == expected.logits.dtype
    assert distance(found.logits, expected.logits) < 4e-2
    assert distance(found.loss, expected.loss) < 1e-2
    assert distance(found.logits, truth.logits) < 1.3 * distance(expected.logits, truth.logits) + 2**-8
    keys = [key for key in grads if not key.endswith(("key.bias", "k_proj.bias"))]
    mine, other = (torch.tensor([distance(g[key], right[key]) for key in keys]) for g in (grads, their_grads))
    assert mine.mean() < 1.3 * other.mean()
    assert mine.max() < 1.5 * other.max()


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_of_training(name):
    """With dropout: both draw the same random numbers, since a norm draws none."""
    losses = []
    theirs, ours = pair(name)
    for model in (theirs, ours):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
        curve = []
        for step in range(10):
            loss = model(**batch(step % 9)).loss  # the last is the first again: it has to be learnt by then
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        losses.append(torch.stack(curve))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    assert losses[0][-1] < losses[0][0]


def generate(model, tokens):
    """The best next token twelve times; none twice, for random weights would say the same one for ever."""
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, no_repeat_ngram_size=1)
    return model.eval().generate(tokens, attention_mask=torch.ones_like(tokens), **options)


@pytest.mark.parametrize("name", GENERATES)
def test_generation(name):
    """The same tokens as the original, alone; and the same whatever else is in the batch."""
    theirs, ours = pair(name)
    tokens = torch.randint(3, VOCAB, (6, 7))
    alone = [generate(ours, t[None])[0] for t in tokens[:3]]
    for mine, t in zip(alone, tokens, strict=False):
        assert torch.equal(mine, generate(theirs, t[None])[0])
    assert len({tuple(t[-12:].tolist()) for t in alone}) == 3
    for together in (tokens, tokens[[0, 1, 2, 0, 5]]):
        for mine, row in zip(alone, generate(ours, together), strict=False):
            assert torch.equal(row, mine)


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_see_the_batch(name):
    """Every norm in the model, on what it was really given: a row's bits are those it has alone."""
    _, ours = pair(name, torch.bfloat16)
    given = []
    norms = [m for m in ours.modules() if isinstance(m, (lnc.LayerNorm, lnc.convert.Converted))]
    assert len(norms) == NORMS[name]
    for module in norms:
        module.register_forward_hook(lambda m, args, y: given.append((m, args[0].detach(), y.detach())))
    ours.eval()(**batch())
    for module, x, y in list(given):
        with torch.no_grad():
            assert torch.equal(module.forward(x[:1]), y[:1])
            assert torch.equal(module.forward(x[-1, -1]), y[-1, -1])


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_restored(name):
    theirs, ours = pair(name)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(state)
    assert [r.replaced for r in lnc.restore_norms(ours)] == [True] * NORMS[name]
    theirs.eval(), ours.eval()
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


@pytest.mark.parametrize("name", ["GPT-2", "T5"])
def test_compiled(name):
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("transformers asks torch.compiler.is_exporting, which came with torch 2.7")
    ours = MODELS[name](layers=1).eval()
    lnc.replace_norms(ours)
    inputs = {key: value for key, value in batch().items() if key != "attention_mask"}
    compiled = torch.compile(ours, backend="aot_eager")
    expected, right = gradients(ours, **inputs)
    output = compiled(**inputs)
    torch.testing.assert_close(output.logits, expected.logits)
    grads = torch.autograd.grad(output.loss, list(ours.parameters()))
    torch.testing.assert_close(list(grads), list(right.values()), rtol=1e-4, atol=1e-5)


def test_gemma():
    """A model whose norms multiply by 1 + weight; llama's rule for the output's dtype is in its queries and keys."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, **IDS,
    )  # fmt: skip
    theirs = transformers.Gemma3ForCausalLM(config).eval()
    ours = copy.deepcopy(theirs)
    report = lnc.replace_norms(ours)
    assert [r.replaced for r in report] == [True] * 13
    assert all(r.after.recipe.zero_centered for r in report)
    expected, right = gradients(theirs, **batch())
    found, grads = gradients(ours, **batch())
    assert distance(found.logits, expected.logits) < 1e-5
    for key, grad in grads.items():
        assert distance(grad, right[key]) < 1e-5, key
