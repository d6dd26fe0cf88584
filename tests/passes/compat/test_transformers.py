from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from passes.compat.transformers import (
    GraphState,
    LayerCache,
    StatefulGeneration,
    attention_replaced,
    image_processor_class,
    processor_class,
    tensor_renaming,
    use_sdpa,
    with_any_video_processor,
)
from vlmconvert.families import demo_checkpoint

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES)
    use_sdpa(config)
    return LlamaModel(config).eval()


def test_names_in_files_lead_to_names_in_memory():
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES)))
    rename = tensor_renaming(model)
    for in_file, in_memory in (
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
    ):
        assert rename(in_file) == in_memory, (
            "transformers maps names otherwise: tensors of checkpoints would not be found"
        )
        assert in_memory in model.state_dict()


def test_attention_is_chosen_by_the_config_and_can_be_replaced(decoder):
    seen = []

    def wrap(whole):
        def attention(module, query, key, value, attention_mask, scaling=None, is_causal=None, **others):
            seen.append((query.shape, key.shape, attention_mask, scaling, is_causal, others))
            return whole(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **others)

        return attention

    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = decoder(tokens, use_cache=False).last_hidden_state
        with attention_replaced(wrap):
            inside = decoder(tokens, use_cache=False).last_hidden_state
        calls = len(seen)
        after = decoder(tokens, use_cache=False).last_hidden_state
    assert calls == 1, (
        "layers no longer look sdpa up in ALL_ATTENTION_FUNCTIONS, or configs no longer choose it: ONNX artifacts would "
        "repeat keys and values"
    )
    assert len(seen) == calls, "the replacement of attention outlives its context"
    query, key, _, scaling, _, others = seen[0]
    assert (query, key, scaling) == ((1, 4, 3, 8), (1, 2, 3, 8), 8**-0.5), (
        "attention is given other shapes, or no scaling: keys and values of ONNX artifacts would be shared in a wrong way"
    )
    assert others.get("position_bias") is None
    assert torch.equal(before, inside)
    assert torch.equal(before, after)


def test_a_decoder_layer_takes_plain_tensors_as_its_cache(decoder):
    """What `vlmconvert.families.parts.decoder_modules` takes a decoder apart by."""
    tokens = torch.tensor([[1, 2, 3, 4]])
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        decoder(tokens[:, :3], past_key_values=cache)
        keys, values = cache.layers[0].keys.clone(), cache.layers[0].values.clone()
        expected = decoder(tokens[:, 3:], past_key_values=cache).last_hidden_state
        own = LayerCache(keys, values)
        hidden_states = decoder.embed_tokens(tokens[:, 3:])
        embeddings = decoder.rotary_emb(hidden_states, torch.tensor([[3]]))
        hidden_states = decoder.layers[0](
            hidden_states, attention_mask=torch.zeros(1, 1, 1, 4), position_embeddings=embeddings, past_key_values=own
        )
        actual = decoder.norm(hidden_states)
    assert own.keys.shape == (1, 2, 4, 8), "decoder layers no longer call `update` of their cache: no cache would grow"
    assert torch.equal(own.keys, cache.layers[0].keys)
    torch.testing.assert_close(actual, expected, msg="decoder layers want other arguments than families give them")


def test_cross_attention_looks_its_keys_up_in_the_cache():
    config = MllamaTextConfig(**SIZES, cross_attention_layers=[0])
    use_sdpa(config)
    torch.manual_seed(0)
    attention = MllamaTextCrossAttention(config, layer_idx=0).eval()
    states, image = torch.randn(1, 3, 32), torch.randn(1, 5, 32)
    cache = DynamicCache()
    with torch.no_grad():
        expected, _ = attention(states, cross_attention_states=image, past_key_values=cache)
        kept = LayerCache(cache.layers[0].keys, cache.layers[0].values)
        actual, _ = attention(states, cross_attention_states=None, past_key_values=kept)
    torch.testing.assert_close(
        actual,
        expected,
        msg="cross-attention no longer reads `layers[0].keys` of its cache: mllama could not be traced",
    )


class Parrot(StatefulGeneration, GenerationMixin):
    """Says 1, 2, 3, ..., whatever it is asked; notes what `generate` asks of it."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.config = PreTrainedConfig(vocab_size=16, eos_token_id=9, pad_token_id=0)
        self.generation_config = GenerationConfig(eos_token_id=9, pad_token_id=0)
        self.calls = []

    def __call__(self, input_ids, past_key_values=None, **options):
        self.calls.append("step" if past_key_values else "prefill")
        said = self.calls.count("step")
        logits = torch.zeros(len(input_ids), 1, 16)
        logits[:, :, [said + 1, said + 2]] = torch.tensor([9.0, 8.9])
        return CausalLMOutputWithPast(logits=logits, past_key_values=GraphState())

    forward = __call__

    def prepare_inputs_for_generation(self, input_ids, **options):
        return {"input_ids": input_ids, **options}

    def repeat_rows(self, times):
        self.calls.append(f"repeat {times}")

    def reorder_rows(self, rows):
        self.calls.append(f"reorder {len(rows)}")
        assert isinstance(rows, np.ndarray)

    def check_inputs(self, given):
        if unknown := given - {"input_ids", "attention_mask"}:
            raise ValueError(f"unknown: {unknown}")


def test_generate_tells_a_model_with_a_state_of_its_own_what_it_must_know():
    parrot = Parrot()
    answer = parrot.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert answer.tolist() == [[5, 6, 1, 2, 3]]
    assert parrot.calls == ["repeat 1", "prefill", "step", "step"], (
        "generate handles a stateful model otherwise: artifacts could not be run by `generate`"
    )


def test_beams_are_repeated_and_reordered():
    parrot = Parrot()
    parrot.generate(torch.tensor([[5, 6]]), max_new_tokens=3, num_beams=2, do_sample=False)
    assert parrot.calls[:4] == ["repeat 2", "prefill", "reorder 2", "step"], (
        "generate no longer asks for beams in this order: beam search would go on from other rows' caches"
    )


def test_an_input_that_the_model_does_not_know_is_refused():
    with pytest.raises(ValueError, match="pixel_valeus"):
        Parrot().generate(torch.tensor([[5, 6]]), max_new_tokens=1, pixel_valeus=torch.zeros(1))


def test_a_streamer_is_given_the_prompt_and_then_each_token():
    """`vlmconvert.measuring.process` takes the time of the first token from the second call."""
    given = []
    streamer = SimpleNamespace(put=lambda tokens: given.append(tokens.tolist()), end=lambda: None)
    Parrot().generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False, streamer=streamer)
    assert given == [[[5, 6]], [1], [2]], "generate streams otherwise: `bench` would time other tokens than it says"


def test_processors_are_found_by_the_models_type():
    for model_type in ("mllama", "llava", "llava_next", "llava_next_video"):
        assert image_processor_class(model_type).__name__.endswith("Pil"), (
            f"transformers no longer says which class processes images of {model_type} with Pillow"
        )
        assert hasattr(transformers, processor_class(model_type))


def test_a_processor_takes_any_object_for_videos():
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint("llava"))
    images, video_processor = image_processor_class("llava_next_video")(), object()
    processor = with_any_video_processor(transformers.LlavaNextVideoProcessor)(video_processor, images, tokenizer)
    assert processor.video_processor is video_processor, (
        "transformers checks the class of a video processor in another way: videos would need torchvision"
    )
