import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface

import kdfast

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DECODER = {**TINY, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}

# Architecture: its model class, the entries of its configuration, and the modules whose weights
# its queries and keys come from.
MODELS = {
    "bert": ("BertModel", TINY, ("query", "key")),
    "roberta": ("RobertaModel", TINY, ("query", "key")),
    "electra": ("ElectraModel", {**TINY, "embedding_size": 16}, ("query", "key")),
    "distilbert": (
        "DistilBertModel",
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        ("q_lin", "k_lin"),
    ),
    "modernbert": (
        "ModernBertModel",
        {**TINY, "pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2},
        ("Wqkv",),
    ),
    "gpt2": (
        "GPT2Model",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ("c_attn",),
    ),
    "llama": ("LlamaModel", DECODER, ("q_proj", "k_proj")),
    "qwen3": ("Qwen3Model", DECODER, ("q_proj", "k_proj", "q_norm", "k_norm")),
    "mistral": ("MistralModel", {**DECODER, "sliding_window": 5}, ("q_proj", "k_proj")),
    "gemma": ("GemmaModel", DECODER, ("q_proj", "k_proj")),
    "gemma3": (
        "Gemma3TextModel",
        {**DECODER, "sliding_window": 5, "query_pre_attn_scalar": 16},
        ("q_proj", "k_proj"),
    ),
    "t5": (
        "T5EncoderModel",
        {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        ("q", "k"),
    ),
}
BERT = "encoder.layer.{}.attention.self"

# The name that all releases of transformers know, and the newest ones warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")


def tiny(architecture, attention="sdpa"):
    name, entries, _ = MODELS[architecture]
    cls = getattr(transformers, name)
    torch.manual_seed(1)
    model = cls(cls.config_class(**entries))
    with torch.no_grad():
        # Scores that are not all near 0, and norms and biases that do something.
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.set_attn_implementation(attention)
    return model.eval()


def batch():
    ids, mask = torch.randint(1, 60, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def capture(model, architecture="", layers=None):
    return kdfast.capture_attention(model, layers, allow_partial_scores=architecture == "t5")


def scores(inputs):
    key = inputs.key.repeat_interleave(inputs.query.shape[1] // inputs.key.shape[1], 1)
    return inputs.scale * inputs.query @ key.mT


def visible(model, name, mask, causal):
    """Which keys a query sees, `[B, 1, S, S]`, from the batch's mask and the layer's structure."""
    length = mask.shape[1]
    seen = mask.bool()[:, None, None, :].expand(-1, 1, length, length)
    if causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    module = model.get_submodule(name)
    # Layers have a window of their own, or all have the model's.
    window = getattr(module, "sliding_window", getattr(model.config, "sliding_window", None))
    if window is not None:
        seen = seen & torch.ones(length, length, dtype=torch.bool).triu(1 - window)
        if not causal:
            seen = seen & torch.ones(length, length, dtype=torch.bool).tril(window - 1)
    return seen


def outputs(model, inputs):
    return model(**inputs).last_hidden_state


# What is recorded.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MODELS)
def test_scores_are_those_of_the_model(architecture, attention):
    inputs = batch()
    expected = tiny(architecture, "eager")(**inputs, output_attentions=True).attentions
    model = tiny(architecture, attention)
    with capture(model, architecture) as records:
        model(**inputs)
    assert len(records) == len(expected) == 2
    bias = 0
    if architecture == "t5":
        bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(11, 11)
    real = inputs["attention_mask"].bool()
    for (name, recorded), maps in zip(records.items(), expected, strict=True):
        seen = visible(model, name, inputs["attention_mask"], recorded.causal)
        found = (scores(recorded) + bias).masked_fill(~seen, -torch.inf).softmax(-1)
        # A query of padding may see nothing at all, and what it makes of that differs.
        error = (found - maps).transpose(1, 2)[real].abs().max()
        assert error <= 1e-6, (name, error)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MODELS)
def test_outputs_are_the_same_to_the_bit(architecture, attention):
    model, inputs = tiny(architecture, attention), batch()
    before = outputs(model, inputs)
    with capture(model, architecture):
        during = outputs(model, inputs)
    assert torch.equal(before, during)
    assert torch.equal(before, outputs(model, inputs))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", MODELS)
def test_gradients_reach_the_projections(architecture, attention):
    model = tiny(architecture, attention).train()
    with capture(model, architecture) as records:
        model(**batch())
    last = list(records)[-1]
    scores(records[last]).square().mean().backward()
    for name in MODELS[architecture][2]:
        module = model.get_submodule(last).get_submodule(name)
        assert module.weight.grad.abs().max() > 0


def test_what_a_record_holds():
    model = tiny("llama")
    with kdfast.capture_attention(model) as records:
        model(**batch())
    assert list(records) == ["layers.0.self_attn", "layers.1.self_attn"]
    query, key, scale, causal = records["layers.0.self_attn"]
    assert query.shape == (2, 4, 11, 8)
    assert key.shape == (2, 2, 11, 8)
    assert scale == 8**-0.5
    assert causal is True
    model = tiny("bert")
    with kdfast.capture_attention(model) as records:
        model(**batch())
    assert [recorded.causal for recorded in records.values()] == [False, False]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, [0, 1]), ([1], [1]), ([-1], [1]), (range(2), [0, 1]), ([1, 0], [0, 1]), ([], [])],
)
def test_layers(layers, expected):
    model = tiny("bert")
    with kdfast.capture_attention(model, layers) as records:
        model(**batch())
    assert list(records) == [BERT.format(layer) for layer in expected]
    with kdfast.capture_attention(model, [BERT.format(1)]) as records:
        model(**batch())
    assert list(records) == [BERT.format(1)]


def test_a_forward_pass_replaces_the_one_before():
    model, first, second = tiny("bert"), batch(), batch()
    with kdfast.capture_attention(model) as records:
        model(**first)
        before = dict(records)
        model(**second)
    assert list(records) == list(before)
    for name in records:
        assert not torch.equal(records[name].query, before[name].query)


def test_the_first_run_of_a_shared_layer_counts():
    config = transformers.AlbertConfig(**{**TINY, "embedding_size": 16, "num_hidden_layers": 3})
    model = transformers.AlbertModel(config).eval()
    shorter = transformers.AlbertModel(transformers.AlbertConfig(
        **{**TINY, "embedding_size": 16, "num_hidden_layers": 1}
    )).eval()  # fmt: skip
    shorter.load_state_dict(model.state_dict())
    inputs = batch()
    with kdfast.capture_attention(model) as records:
        model(**inputs)
    with kdfast.capture_attention(shorter) as expected:
        shorter(**inputs)
    assert len(records) == 1
    for name, recorded in records.items():
        assert torch.equal(recorded.query, expected[name].query)


def test_a_part_of_a_model_that_runs_by_itself():
    config = transformers.T5Config(**MODELS["t5"][1])
    model = transformers.T5ForConditionalGeneration(config).eval()
    names = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    with kdfast.capture_attention(model, names, allow_partial_scores=True) as records:
        model.get_encoder()(**batch())
        assert list(records) == names
        model(**batch(), decoder_input_ids=torch.ones(2, 5, dtype=torch.long))
        of_whole = dict(records)
        model.get_encoder()(**batch())
    assert list(records) == names
    assert all(records[name].query is not of_whole[name].query for name in names)


def test_cross_attention_is_not_causal():
    config = transformers.T5Config(**MODELS["t5"][1])
    model = transformers.T5ForConditionalGeneration(config).eval()
    with kdfast.capture_attention(model, allow_partial_scores=True) as records:
        model(**batch(), decoder_input_ids=torch.ones(2, 5, dtype=torch.long))
    causal = {name: recorded.causal for name, recorded in records.items()}
    assert causal["encoder.block.0.layer.0.SelfAttention"] is False
    assert causal["decoder.block.1.layer.0.SelfAttention"] is True
    assert causal["decoder.block.1.layer.1.EncDecAttention"] is False
    cross = records["decoder.block.1.layer.1.EncDecAttention"]
    assert (cross.query.shape[2], cross.key.shape[2]) == (5, 11)


# Training.


def _attention_gradients(model, inputs, step_inside):
    """Of a loss of scores and outputs, whose backward pass may run with the capture still open."""
    with kdfast.capture_attention(model) as records:
        output = outputs(model, inputs)
        queries = {name: recorded.query for name, recorded in records.items()}
        loss = output.square().mean() + sum(scores(r).square().mean() for r in records.values())
        if step_inside:
            loss.backward()
            assert all(records[name].query is query for name, query in queries.items())
    if not step_inside:
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("step_inside", [True, False])
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "modernbert"])
def test_checkpointing_gives_the_same_gradients(architecture, step_inside):
    inputs = batch()
    plain, checkpointed = tiny(architecture), tiny(architecture)
    for model in (plain, checkpointed):
        # Checkpoints are for training, and dropout would make the two differ.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointed.gradient_checkpointing_enable(**options)
    expected = _attention_gradients(plain, inputs, step_inside)
    found = _attention_gradients(checkpointed, inputs, step_inside)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if expected[name] is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


def test_reentrant_checkpointing_raises():
    model = tiny("bert").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with (
        kdfast.capture_attention(model),
        pytest.raises(
            RuntimeError, match=r"encoder.layer.0.* require grad.*use_reentrant.*activation_checkp"
        ),
    ):
        model(**batch())


def test_a_frozen_student_raises():
    model = tiny("bert").train().requires_grad_(False)
    with (
        kdfast.capture_attention(model),
        pytest.raises(RuntimeError, match=r"does not require grad.*model.eval\(\)"),
    ):
        model(**batch())
    # Above the first layer that trains there is a gradient.
    model.encoder.layer[0].output.requires_grad_(True)
    with kdfast.capture_attention(model, [1]) as records:
        model(**batch())
    assert records[BERT.format(1)].query.requires_grad


def test_a_teacher_needs_no_gradient():
    model = tiny("bert").requires_grad_(False)
    with kdfast.capture_attention(model) as records:
        model(**batch())
        assert len(records) == 2
        with torch.no_grad():
            model.train()(**batch())
        assert len(records) == 2
    assert not any(recorded.query.requires_grad for recorded in records.values())


def test_nothing_is_kept_alive():
    model = tiny("bert")
    with torch.no_grad(), kdfast.capture_attention(model) as records:
        model(**batch())
    query = weakref.ref(records[BERT.format(0)].query)
    del records
    gc.collect()
    assert query() is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())


# Beside each other.


def test_two_models_at_once():
    student, teacher, inputs = tiny("bert", "eager"), tiny("distilbert"), batch()
    with kdfast.capture_attention(student) as of_student:
        student(**inputs)
        alone = dict(of_student)
    with (
        kdfast.capture_attention(student) as of_student,
        kdfast.capture_attention(teacher) as of_teacher,
    ):
        student(**inputs)
        assert not of_teacher
        teacher(**inputs)
    assert list(of_student) == [BERT.format(i) for i in range(2)]
    assert list(of_teacher) == [f"transformer.layer.{i}.attention" for i in range(2)]
    for name, recorded in of_student.items():
        assert torch.equal(recorded.query, alone[name].query)


def test_nested_captures_of_one_model():
    model, inputs, lookup = tiny("bert"), batch(), AttentionInterface.get_interface
    with kdfast.capture_attention(model) as outer:
        with kdfast.capture_attention(model, [1]) as inner:
            model(**inputs)
        within = dict(outer)
        model(**batch())
        assert AttentionInterface.get_interface is not lookup
    assert list(inner) == [BERT.format(1)]
    assert inner[BERT.format(1)].query is within[BERT.format(1)].query
    assert outer[BERT.format(1)].query is not inner[BERT.format(1)].query
    assert AttentionInterface.get_interface is lookup


def test_an_exception_restores_everything():
    model, lookup = tiny("bert"), AttentionInterface.get_interface
    handle = model.encoder.layer[1].register_forward_pre_hook(_fail)
    with pytest.raises(ZeroDivisionError), kdfast.capture_attention(model) as records:
        model(**batch())
    handle.remove()
    assert list(records) == [BERT.format(0)]
    assert AttentionInterface.get_interface is lookup
    assert not any(module._forward_hooks for module in model.modules())
    model(**batch())
    assert list(records) == [BERT.format(0)]
    # A pass that failed does not count: the next one is recorded.
    with kdfast.capture_attention(model) as records:
        handle = model.encoder.layer[1].register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            model(**batch())
        handle.remove()
        first = records[BERT.format(0)].query
        model(**batch())
    assert records[BERT.format(0)].query is not first


def _fail(*_):
    raise ZeroDivisionError


def test_captures_that_close_in_another_order():
    lookup = AttentionInterface.get_interface
    first, second = tiny("bert"), tiny("distilbert")
    captures = [kdfast.capture_attention(model) for model in (first, second)]
    records = [capture.__enter__() for capture in captures]
    first(**batch())
    queries = [recorded.query for recorded in records[0].values()]
    captures[0].__exit__(None, None, None)
    first(**batch())
    second(**batch())
    captures[1].__exit__(None, None, None)
    assert [len(found) for found in records] == [2, 2]
    assert all(r.query is q for r, q in zip(records[0].values(), queries, strict=True))
    assert AttentionInterface.get_interface is lookup


def test_threads_do_not_see_each_other():
    # Both threads run both models, and each captures one of them while the other does too.
    models, inputs = [tiny("bert"), tiny("bert", "eager")], [batch(), batch()]
    lookup, meet = AttentionInterface.get_interface, threading.Barrier(2, timeout=30)
    found, errors = [None, None], []

    def run(thread):
        try:
            for _ in range(5):
                meet.wait()
                with kdfast.capture_attention(models[thread]) as records, torch.no_grad():
                    models[1 - thread](**inputs[thread])
                    assert not records
                    meet.wait()
                    models[thread](**inputs[thread])
                    meet.wait()
                    found[thread] = records
        except BaseException as error:
            errors.append(error)
            meet.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert AttentionInterface.get_interface is lookup
    for thread in range(2):
        with kdfast.capture_attention(models[thread]) as records, torch.no_grad():
            models[thread](**inputs[thread])
        assert list(found[thread]) == list(records)
        for name, recorded in records.items():
            assert torch.equal(found[thread][name].query, recorded.query)


def test_a_thread_records_its_own_calls_of_a_model():
    model, mine, other = tiny("bert"), batch(), batch()
    with kdfast.capture_attention(model) as records:
        model(**mine)
        queries = [recorded.query for recorded in records.values()]
        thread = threading.Thread(target=lambda: model(**other))
        thread.start()
        thread.join()
    assert all(r.query is q for r, q in zip(records.values(), queries, strict=True))


# What cannot be recorded.


@pytest.mark.parametrize(
    ("name", "entries", "attention"),
    [
        ("DebertaV2Model", TINY, "DisentangledSelfAttention"),
        ("MPNetModel", TINY, "MPNetSelfAttention"),
        ("FalconModel", {**TINY, "num_kv_heads": 4}, "FalconAttention"),
        ("BloomModel", {"vocab_size": 60, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "Bloom"),
        (
            "XLNetModel",
            {"vocab_size": 60, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 8},
            "XLNetRelativeAttention",
        ),
    ],
)
def test_models_that_do_not_use_the_interface(name, entries, attention):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**entries))
    with (
        pytest.raises(ValueError, match=rf"{name} does not .*{attention}.*kdfast.attention_mse"),
        kdfast.capture_attention(model),
    ):
        pass


def test_a_layer_that_leaves_the_interface():
    config = transformers.GPT2Config(**MODELS["gpt2"][1], reorder_and_upcast_attn=True)
    model = transformers.GPT2Model(config).eval()
    model.set_attn_implementation("eager")
    with (
        kdfast.capture_attention(model),
        pytest.raises(RuntimeError, match=r"h\.0\.attn \(GPT2Attention\) did not route"),
    ):
        model(**batch())
    model.set_attn_implementation("sdpa")
    with kdfast.capture_attention(model) as records:
        model(**batch())
    assert len(records) == 2


def test_nothing_recorded_raises():
    model, message = tiny("bert"), "no attention layer of BertModel ran while it was captured"
    with pytest.raises(RuntimeError, match=message), kdfast.capture_attention(model):
        tiny("bert")(**batch())
    # An error of the block's own is not replaced, and none follows one that the block has caught.
    with pytest.raises(ZeroDivisionError), kdfast.capture_attention(model):
        _fail()
    partial = tiny("t5")
    with (
        kdfast.capture_attention(partial) as records,
        pytest.raises(RuntimeError, match="allow_partial_scores"),
    ):
        partial(**batch())
    assert records == {}
    with kdfast.capture_attention(model, []) as records:
        pass
    assert records == {}
    torch.compiler.reset()
    compiled, inputs = torch.compile(model, backend="eager"), batch()
    with torch.no_grad():
        compiled(**inputs)
        with pytest.raises(RuntimeError, match=message), kdfast.capture_attention(model):
            compiled(**inputs)


PARTIAL = {
    "a relative position bias": ("T5EncoderModel", MODELS["t5"][1], "sdpa"),
    "a softcap": ("Gemma2Model", {**DECODER, "sliding_window": 5}, "eager"),
    "attention sinks": (
        "GptOssModel",
        {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5},
        "eager",
    ),
}


@pytest.mark.parametrize("part", PARTIAL)
def test_partial_scores_raise_unless_asked_for(part):
    name, entries, attention = PARTIAL[part]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**entries)).eval()
    model.set_attn_implementation(attention)
    inputs = batch()
    expected = outputs(model, inputs)
    with (
        kdfast.capture_attention(model),
        pytest.raises(RuntimeError, match=f"adds {part} to its scores.*allow_partial_scores=True"),
    ):
        model(**inputs)
    with kdfast.capture_attention(model, allow_partial_scores=True) as records:
        assert torch.equal(outputs(model, inputs), expected)
    assert len(records) == 2


def test_a_bias_in_the_mask_is_a_partial_score():
    model, inputs = tiny("bert", "eager"), batch()
    inputs["attention_mask"] = torch.zeros(2, 1, 11, 11)
    inputs["attention_mask"][:, :, :, 8:] = -10000.0
    with kdfast.capture_attention(model) as records:
        model(**inputs)
    assert len(records) == 2
    inputs["attention_mask"][:, :, 0, 1] = -0.5
    with (
        kdfast.capture_attention(model),
        pytest.raises(RuntimeError, match="adds a bias in its mask"),
    ):
        model(**inputs)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([2], ValueError, r"layers must be in \[-2, 2\).*BertModel, got 2"),
        ([-3], ValueError, "layers must be in .* got -3"),
        (["encoder"], ValueError, r"layers names 'encoder'.*it has encoder\.layer\.0"),
        ("all", TypeError, "layers must be a sequence .* got str"),
        (1, TypeError, "layers must be a sequence .* got int"),
        ([True], TypeError, "layers must be numbers and module names, got True"),
    ],
)
def test_bad_layers(layers, error, message):
    with pytest.raises(error, match=message), kdfast.capture_attention(tiny("bert"), layers):
        pass


def test_bad_model():
    with (
        pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"),
        kdfast.capture_attention({}),
    ):
        pass


def test_import_needs_no_transformers():
    code = "import sys, kdfast; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with (
        pytest.raises(ImportError, match=r"needs transformers 5.0 .*kdfast\[trainer\]"),
        kdfast.capture_attention(nn.Linear(1, 1)),
    ):
        pass


def test_an_older_transformers(monkeypatch):
    monkeypatch.delattr(AttentionInterface, "get_interface")
    with (
        pytest.raises(ImportError, match=r"needs transformers 5.0 or newer, got 5"),
        kdfast.capture_attention(nn.Linear(1, 1)),
    ):
        pass
