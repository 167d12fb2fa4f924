"""Small random models of the real classes that sentence-transformers loads, with tokenizers and processors, as folders.

Nothing is downloaded. The tokenizer knows the 256 bytes and the control tokens of Qwen's models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from mm_retriever.from_pretrained import without_progress_bar, without_video_processor

CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QUERY_TOLD = "Retrieve images or text relevant to the user's query."
PARTS = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
)
EMBEDDING_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nRepresent the user's input.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
RERANK_TEMPLATE = (
    "<|im_start|>system\nJudge the document.<|im_end|>\n<|im_start|>user\n{% for message in messages %}"
    "<{{ message.role }}>: " + PARTS + "\n{% endfor %}<|im_end|>\n<|im_start|>assistant\n"
)


def byte_tokenizer(*, bos: bool = False, length: int = 4096, **options: Any) -> PreTrainedTokenizerFast:
    """Every byte a token; with `bos`, the start and the end are marked."""
    names = ["<pad>", "<s>", "</s>", *CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=length,
        additional_special_tokens=list(CONTROL), **options,
    )  # fmt: skip


def clip_folder(path: Path, *, seed: int = 0) -> Path:
    """A plain CLIP of 16 numbers for images of 32 x 32."""
    tokenizer = byte_tokenizer(bos=True, length=40)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 40, "eos_token_id": 2, "bos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_range=0.5)
    CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


def siglip2_folder(path: Path, *, seed: int = 1) -> Path:
    """A SigLIP2 of one size of images, which is of the class SigLIP, of 24 numbers for images of 32 x 32."""
    tokenizer = byte_tokenizer(length=24, model_input_names=["input_ids"])  # published without a mask, too
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 24, "projection_size": 24,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(path)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    SiglipProcessor(images, tokenizer).save_pretrained(path)
    return path


def siglip2_naflex_folder(path: Path, *, seed: int = 5) -> Path:
    """A SigLIP2 that sees images in their own shape, at most 256 patches of 16 x 16: its processor takes no other."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *map(chr, range(33, 127))]
    tokenizer = Siglip2Tokenizer({name: number for number, name in enumerate(names)}, [], model_max_length=24)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 24, "projection_size": 24,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16,
        "num_patches": 256,
    }  # fmt: skip
    torch.manual_seed(seed)
    Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(path)
    images = Siglip2ImageProcessorPil()
    Siglip2Processor(images, tokenizer).save_pretrained(path)
    return path


def old_clip_folder(path: Path, *, seed: int = 0) -> Path:
    """The same CLIP as sentence-transformers saved it before version 5: the model in a folder of its own."""
    clip_folder(path / "0_CLIPModel", seed=seed)
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (path / "modules.json").write_text(json.dumps(modules))
    return path


def qwen3_vl(path: Path, template: str, *, seed: int = 2) -> Path:
    """Weights and processor of a Qwen3-VL, as its authors lay them out."""
    tokenizer = byte_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in CONTROL}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [3, 3, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"], tie_word_embeddings=True,
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)
    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    )
    with without_video_processor():
        Qwen3VLProcessor(images, tokenizer, chat_template=template).save_pretrained(path)
    return path


def qwen3_vl_embedding_folder(path: Path, *, seed: int = 2) -> Path:
    """A Qwen3-VL-Embedding of 32 numbers, saved by sentence-transformers: last token, instructions for both sides."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    base = qwen3_vl(path / "base", EMBEDDING_TEMPLATE, seed=seed)
    with without_video_processor(), without_progress_bar():
        modules: list[Any] = [Transformer(str(base)), Pooling(32, "lasttoken"), Normalize()]
        SentenceTransformer(modules=modules, prompts={"query": QUERY_TOLD}, device="cpu").save(
            str(path / "model"), create_model_card=False
        )
    return path / "model"


def qwen3_vl_reranker_folder(path: Path, *, seed: int = 3) -> Path:
    """A Qwen3-VL-Reranker, saved by sentence-transformers: the log-odds of one token over another."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    base = qwen3_vl(path / "base", RERANK_TEMPLATE, seed=seed)
    with without_video_processor(), without_progress_bar():
        modules: list[Any] = [Transformer(str(base), transformer_task="any-to-any"), LogitScore(20, 30)]
        CrossEncoder(modules=modules, device="cpu", activation_fn=torch.nn.Identity()).save(
            str(path / "model"), create_model_card=False
        )
    return path / "model"


def text_reranker_folder(path: Path, *, seed: int = 4) -> Path:
    """A cross-encoder of the class of BAAI/bge-reranker-v2-m3, with its layout: no file of sentence-transformers."""
    tokenizer = byte_tokenizer(bos=True, length=120)
    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=130, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1,
        initializer_range=0.5,
    )  # fmt: skip
    XLMRobertaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
