"""Phi-3 Vision against the original's recorded outputs, and against itself where it offers two ways."""

from __future__ import annotations

import copy
import json
import math
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel, Phi3Config, Phi3ForCausalLM

from mm_retriever.errors import PromptError
from mm_retriever.phi3_vision.model import CPU_ATTENTION, Phi3Vision
from mm_retriever.phi3_vision.processor import Phi3VisionProcessor, processor_for
from mm_retriever.phi3_vision.tower import Phi3VisionConfig
from tests.support.phi3_vision_golden import ASK, DATA, made_image, photo
from tests.support.phi3_vision_small import (
    SHORT_CONTEXT,
    seeded,
    small_config,
    small_model,
    small_processor,
    small_tokenizer,
)

# ---------------------------------------------------------------- the original's model, cut down


def golden_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight as a function of its name, in float32 throughout: the recipe the goldens were made with."""
    noise = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape).astype(np.float32)
    if name.endswith(("glb_GN", "sub_GN", "embed_tokens.weight", "position_embedding.weight", "class_embedding")):
        noise = noise * np.float32(0.02)
    elif len(shape) >= 2:
        noise = noise / np.float32(math.sqrt(math.prod(shape[1:])))
    elif name.endswith("weight"):
        noise = np.float32(1) + np.float32(0.1) * noise
    else:
        noise = noise * np.float32(0.02)
    return torch.from_numpy(noise)


@pytest.fixture(scope="module")
def golden_model() -> Phi3Vision:
    settings = json.loads((DATA / "config.json").read_text())
    config = Phi3VisionConfig(**settings, vision_config={"num_hidden_layers": 3, "intermediate_size": 512})
    config.dtype = torch.float32
    with torch.device("meta"):
        model = Phi3Vision(config)
    weights = {name: golden_weight(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    loaded = Phi3Vision.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    return loaded.eval()


@pytest.mark.parametrize("case", ["text", "img1_rgba_nc1"])
def test_logits_features_and_greedy_words_are_the_originals(case: str, golden_model: Phi3Vision) -> None:
    """Truth: the original code on seeded weights, ViT-L/14-336 and a 384-wide decoder of three layers each."""
    stored = np.load(DATA / "golden.npz")
    golden = {key.split("/")[1]: stored[key] for key in stored.files if key.startswith(case)}
    ids = torch.tensor(golden["input_ids"], dtype=torch.long)[None]
    inputs: dict[str, torch.Tensor] = {}
    if case != "text":
        images = Phi3VisionProcessor(small_tokenizer(), num_crops=1).image_inputs([photo("photo640x480")])
        inputs = {"pixel_values": images.pixel_values, "image_sizes": images.image_sizes}
        with torch.inference_mode():
            features = golden_model.image_features(**inputs)[0].numpy()
        np.testing.assert_allclose(features[:, :4], golden["img_embeds_cols4"], atol=2e-5)
        np.testing.assert_allclose(features[:4], golden["img_embeds_first"], atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), golden["img_embeds_rownorm"], atol=2e-5)
    with torch.inference_mode():
        logits = golden_model(ids, **inputs).logits[0].numpy()
    np.testing.assert_allclose(logits[golden["logits_pos"]][:, ::64], golden["logits_slice"], atol=2e-5)
    assert (logits.argmax(-1) == golden["argmax_all"]).all()
    written = golden_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, **inputs
    )
    assert written[0, ids.shape[1] :].tolist() == golden["generated"].tolist()


# ---------------------------------------------------------------- tower and layout


def test_features_skip_the_layers_above_without_changing_a_bit() -> None:
    """Truth: hidden_states[-2] of transformers' whole tower."""
    model = small_model()
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    assert len(tower.encoder.layers) == 2
    settings = copy.deepcopy(model.config.vision_config)
    whole = CLIPVisionModel(settings).eval()
    missing, unexpected = whole.load_state_dict(tower.state_dict(), strict=False)
    assert {key.split(".")[2] for key in missing} == {"2"}
    assert not unexpected
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model.model.vision_embed_tokens.img_processor(pixels)
        theirs = whole(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(ours, theirs)


def test_crops_are_laid_out_as_one_image_then_separator_then_global_view() -> None:
    """Truth: the layout written out token by token from the paper's description and the original code."""
    model, processor = small_model(), small_processor(7)
    embeddings = model.model.vision_embed_tokens
    images = processor.image_inputs([made_image(90, 40), made_image(30, 80, seed=1)])
    with torch.inference_mode():
        patches = embeddings.img_processor(images.pixel_values).view(-1, 8, 8, 20)
        expected, start = [], 0
        for height, width in (images.image_sizes // 32).tolist():
            views = patches[start : start + 1 + height * width]
            start += len(views)

            def token(view: torch.Tensor, y: int, x: int) -> torch.Tensor:
                return torch.cat(
                    [view[2 * y, 2 * x], view[2 * y, 2 * x + 1], view[2 * y + 1, 2 * x], view[2 * y + 1, 2 * x + 1]]
                )

            rows = []
            for y in range(4 * height):
                rows += [token(views[1 + (y // 4) * width + x // 4], y % 4, x % 4) for x in range(4 * width)]
                rows.append(embeddings.sub_GN.flatten())
            rows.append(embeddings.glb_GN.flatten())
            for y in range(4):
                rows += [token(views[0], y, x) for x in range(4)] + [embeddings.sub_GN.flatten()]
            expected.append(embeddings.img_projection(torch.stack(rows)))
        features = model.image_features(images.pixel_values, images.image_sizes)
    assert [len(feature) for feature in features] == list(images.token_counts)
    for ours, written_out in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, written_out, atol=1e-5, rtol=1e-5)


def test_padding_crops_are_ignored() -> None:
    """Truth: the original pads every image to num_crops + 1 crops and never reads the padding."""
    model, processor = small_model(), small_processor(4)
    images = processor.image_inputs([made_image(90, 30), made_image(40, 40)])
    assert len(images.pixel_values) == 4 + 5
    padded = torch.full((2, 6, 3, 32, 32), float("nan"))
    padded[0, :4], padded[1, :5] = images.pixel_values[:4], images.pixel_values[4:]
    with torch.inference_mode():
        ours = model.image_features(images.pixel_values, images.image_sizes)
        theirs = model.image_features(padded, images.image_sizes)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(PromptError, match="8 crops"):
        model.image_features(images.pixel_values[:8], images.image_sizes)


def test_an_image_of_one_crop_goes_through_the_tower_once() -> None:
    """Truth: the original runs both views, which are the same pixels."""
    model, processor = small_model(), small_processor(1)
    embeddings = model.model.vision_embed_tokens
    images = processor.image_inputs([made_image(50, 40), made_image(30, 90)])
    assert torch.equal(images.pixel_values[::2], images.pixel_values[1::2])
    seen: list[int] = []
    handle = embeddings.img_processor.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    with torch.inference_mode():
        once = model.image_features(images.pixel_values, images.image_sizes)
        nudged = images.pixel_values + torch.tensor([0, 1e-7] * 2).view(4, 1, 1, 1)
        both = model.image_features(nudged, images.image_sizes)
    handle.remove()
    assert seen == [2, 4]
    for ours, twice in zip(once, both, strict=True):
        torch.testing.assert_close(ours, twice, atol=1e-5, rtol=1e-4)


def test_an_image_without_crops_is_the_separator_and_the_global_view() -> None:
    """Our choice: of one crop the original shows the same pixels twice, before and after the separator."""
    images = [made_image(50, 40), made_image(30, 90)]
    features: list[list[torch.Tensor]] = []
    for crops in (0, 1):
        inputs = small_processor(crops).image_inputs(images)
        with torch.inference_mode():
            features.append(small_model().image_features(inputs.pixel_values, inputs.image_sizes))
    assert [len(image) for image in features[0]] == [1 + 4 * 5, 1 + 4 * 5]
    for once, twice in zip(*features, strict=True):
        torch.testing.assert_close(once, twice[4 * 5 :], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_a_small_model_may_have_one_view_and_ordinary_rope(feature_layer: int) -> None:
    """Truth: our choice, for the bundled model: (side / 2) * (side / 2 + 1) tokens an image."""
    config = small_config(
        rope_scaling=None, rope_theta=10_000.0, embd_layer={"use_hd_transform": False}, hidden_size=40,
        vision_config={"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 2,
                       "image_size": 48, "patch_size": 8, "stem": "patch", "feature_layer": feature_layer},
    )  # fmt: skip
    model, processor = seeded(config), processor_for(config, small_tokenizer(), num_crops=4)
    assert len(model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers) == 4 + feature_layer
    assert "model.vision_embed_tokens.glb_GN" not in model.state_dict()
    inputs = processor(ASK, [made_image(90, 40)])
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    assert int((inputs["input_ids"] < 0).sum()) == 3 * 4
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert written.shape[1] <= inputs["input_ids"].shape[1] + 4
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"].clamp(min=0)).loss
    loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "post_layernorm" not in name]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"stem": "linear"}, "'linear'"),
        ({"stem": "conv", "stem_channels": [8, 8]}, "stem 'conv' is not 'patch'"),
        ({"image_size": 30, "patch_size": 10}, "image_size 30"),
        ({"feature_layer": 0}, "feature_layer 0"),
        ({"num_hidden_layers": 2, "feature_layer": -4}, "feature_layer -4"),
    ],
)
def test_a_tower_that_cannot_be_built_is_refused(vision: dict[str, object], message: str) -> None:
    """Truth: our choice."""
    with pytest.raises(Exception, match=message):
        small_config(vision_config=vision)


# ---------------------------------------------------------------- slots, batches, caches


def test_slots_and_images_must_match() -> None:
    """Truth: our choice; the original would overwrite the wrong rows."""
    model, processor = small_model(), small_processor()
    images = processor.image_inputs([made_image(40, 40), made_image(90, 30)])
    features = model.image_features(images.pixel_values, images.image_sizes)
    first, second = images.token_counts
    good = [1, *[-1] * first, 1, *[-2] * second, 5]
    assert model.embed(good, features).shape == (1, len(good), 24)
    for ids in ([1, *[-2] * first, 1, *[-1] * second], good[:-2], [1, *[-1] * (first + second)], [1, 5]):
        with pytest.raises(PromptError, match="images"):
            model.embed(ids, features)
    with pytest.raises(PromptError, match="images"):
        model.embed(good)
    with pytest.raises(PromptError, match="image_sizes"):
        model(torch.tensor([good]), images.pixel_values)


def test_a_left_padded_batch_says_what_its_rows_say_alone() -> None:
    """Truth: each row on its own."""
    model, processor = small_model(), small_processor()
    prompts = [processor(ASK, [made_image(40, 40)]), processor(ASK.replace("detail", "one word"), [made_image(90, 30)])]
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    ids = torch.full((2, longest), 32000)
    mask = torch.zeros(2, longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        length = prompt["input_ids"].shape[1]
        ids[row, longest - length :], mask[row, longest - length :] = prompt["input_ids"][0], 1
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(
        ids,
        attention_mask=mask,
        pixel_values=torch.cat([prompt["pixel_values"] for prompt in prompts]),
        image_sizes=torch.cat([prompt["image_sizes"] for prompt in prompts]),
        **options,
    )
    for row, prompt in enumerate(prompts):
        alone = model.generate(**prompt, **options)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_beams_and_penalties_work_with_images() -> None:
    """Truth: our choice; both index by the prompt's ids, which must not be negative there."""
    model, processor = small_model(), small_processor()
    inputs = processor(ASK, [made_image(90, 30)])
    written = model.generate(**inputs, max_new_tokens=5, num_beams=3, repetition_penalty=1.3, do_sample=False)
    assert (written >= 0).all()


def test_generate_is_the_argmax_of_forward() -> None:
    """Truth: the whole sequence computed at once, without a cache."""
    model, processor = small_model(), small_processor()
    inputs = processor(ASK, [made_image(90, 30)])
    length = inputs["input_ids"].shape[1]
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, length:]
    ids = torch.cat([inputs["input_ids"], written[None]], dim=1)
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    with torch.inference_mode():
        logits = model(ids, **images, use_cache=False).logits[0]
    assert logits[length - 1 : -1].argmax(-1).tolist() == written.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager", CPU_ATTENTION])
@pytest.mark.parametrize("cuts", [(), (70,), (1, 2, 60, 61, 90)])
def test_a_prefix_extended_is_the_whole_computed_at_once(attention: str, cuts: tuple[int, ...]) -> None:
    """Truth: one forward over everything; cuts may go through an image only if its slots stay together."""
    model, processor = small_model(), small_processor()
    model.set_attn_implementation(attention)
    inputs = processor(ASK, [made_image(40, 40)])
    features = model.image_features(inputs["pixel_values"], inputs["image_sizes"])
    ids = inputs["input_ids"][0]
    slots = (ids < 0).nonzero()
    start, stop = int(slots[0]), int(slots[-1]) + 1
    tail = torch.arange(60) % 97 + 300
    prefix = model.extend(model.prefill(ids[:start]), ids[start:], features)
    bounds = [0, *cuts, len(tail)] if max(cuts, default=0) < len(tail) else [0, 7, len(tail)]
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.cache.layers]
    grown = prefix
    for a, b in pairwise(bounds):
        grown = model.extend(grown, tail[a:b])
    with torch.inference_mode():
        whole = model(torch.cat([ids, tail])[None], inputs["pixel_values"], inputs["image_sizes"]).logits[0, -1]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(grown.logits[0], whole, atol=2e-5, rtol=1e-5)
    assert (grown.length, prefix.length) == (len(ids) + len(tail), len(ids))
    assert prefix.length == prefix.cache.get_seq_length() == stop + len(ids) - stop
    for layer, (keys, values) in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_rows_that_share_a_prefix_are_what_they_are_alone() -> None:
    """Truth: each row on its own."""
    model = small_model()
    prefix = model.prefill([1, 5618, 338, 278])
    rows = torch.tensor([[7483, 310], [1967, 297], [4558, 673]])
    together = model.extend(prefix, rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(together.logits[i], model.extend(prefix, row).logits[0], atol=1e-5, rtol=1e-5)
    again = model.extend(together, rows[:, :1])
    torch.testing.assert_close(again.logits[1], model.extend(prefix, [1967, 297, 1967]).logits[0], atol=1e-5, rtol=1e-5)
    assert prefix.expand(3).logits.shape == (3, 32064)


def test_log_probabilities_of_a_batch_are_those_of_forward() -> None:
    """Truth: log-softmax of one forward per row; rows of different lengths, images and targets."""
    model, processor = small_model(), small_processor()
    images = processor.image_inputs([made_image(40, 40), made_image(90, 30)])
    features = model.image_features(images.pixel_values, images.image_sizes)
    prefix = model.prefill([1, 32010, 29871, 13])
    prompts = [[*[-1] * len(feature), 1, 278] for feature in features] + [[]]
    targets = [[338, 7483, 310], [29973], [5618, 338, 29889, 13]]
    embedded = [model.embed(ids, [feature])[0] for ids, feature in zip(prompts[:2], features, strict=True)]
    embedded.append(embedded[0][:0])
    scores = model.continuation_log_probs(prefix, embedded, targets)
    for score, prompt, target, feature in zip(
        scores, prompts, targets, [*([feature] for feature in features), []], strict=True
    ):
        ids = [1, 32010, 29871, 13, *prompt, *target]
        with torch.inference_mode():
            logits = model(inputs_embeds=model.embed(ids, feature)).logits[0].log_softmax(-1)
        expected = logits[-len(target) - 1 : -1].gather(1, torch.tensor(target)[:, None])[:, 0]
        torch.testing.assert_close(score, expected, atol=2e-5, rtol=1e-5)
    single = model.continuation_log_probs(prefix, embedded[2:], [[338]])
    torch.testing.assert_close(single[0][0], prefix.logits[0].log_softmax(-1)[338])


# ---------------------------------------------------------------- across the short context


def test_rotary_factors_are_those_of_transformers_at_any_one_length() -> None:
    """Truth: transformers' Phi3ForCausalLM, computed at once just below, at and above the boundary."""
    model = small_model()
    settings = model.config.to_dict()
    own = {key: settings[key] for key in Phi3Config().to_dict() if key in settings and key != "model_type"}
    reference = Phi3ForCausalLM(Phi3Config(**own)).eval()
    reference.load_state_dict({key: value for key, value in model.state_dict().items() if "vision" not in key})
    ids = torch.randint(300, 30_000, (1, SHORT_CONTEXT + 9), generator=torch.Generator().manual_seed(2))
    for length in (SHORT_CONTEXT, SHORT_CONTEXT + 1, SHORT_CONTEXT + 9):
        with torch.inference_mode():
            ours = model(ids[:, :length], logits_to_keep=3).logits
            theirs = reference(ids[:, :length], logits_to_keep=3).logits
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_generation_is_right_across_the_short_context() -> None:
    """Truth: every token again from the whole sequence with one set of factors; the original turns to garbage."""
    model = small_model()
    ids = torch.randint(300, 30_000, (1, SHORT_CONTEXT - 5), generator=torch.Generator().manual_seed(3))
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    with torch.inference_mode():
        expected = model(written[:, :-1], long_rope=True, use_cache=False).logits[0, ids.shape[1] - 1 :].argmax(-1)
        mixed = model(written[:, :SHORT_CONTEXT], use_cache=False).logits[0, ids.shape[1] - 1 :]
        assert not torch.allclose(mixed[0], model(written, long_rope=True).logits[0, ids.shape[1] - 1], atol=1e-2)
    assert written[0, ids.shape[1] :].tolist() == expected.tolist()


def test_a_prefix_keeps_its_rotary_factors() -> None:
    """Truth: forward over everything with the factors of its final length."""
    model = small_model()
    ids = torch.randint(300, 30_000, (SHORT_CONTEXT + 20,), generator=torch.Generator().manual_seed(4))
    prefix = model.prefill(ids[:250], total_length=len(ids))
    grown = model.extend(model.extend(prefix, ids[250:310]), ids[310:])
    with torch.inference_mode():
        whole = model(ids[None]).logits[0, -1]
    torch.testing.assert_close(grown.logits[0], whole, atol=2e-5, rtol=1e-5)
    with pytest.raises(PromptError, match="beyond the 300"):
        model.extend(model.prefill(ids[:250]), ids[250:])
    _, cache = model(ids[None, :250], use_cache=True).to_tuple()
    with pytest.raises(PromptError, match="long_rope=True"):
        model(ids[None, 250:], past_key_values=cache)


def test_casting_the_model_does_not_blur_positions() -> None:
    """Truth: the same angles in float32; a rotary buffer in bfloat16 would be off by radians at position 3000."""
    rotary = copy.deepcopy(small_model()).bfloat16().model.rotary_emb
    positions = torch.tensor([[3000]])
    cos, _ = rotary(torch.zeros(1), positions)
    reference, _ = small_model().model.rotary_emb(torch.zeros(1), positions)
    assert torch.equal(cos, reference)
