"""Answers, logits and counts that others have published for the real checkpoints, beside ours.

    python tests/official.py                                        what is known of which checkpoint
    python tests/official.py llava-hf/llava-interleave-qwen-0.5b-hf --pictures FOLDER
    python tests/official.py llava-hf/llava-1.5-7b-hf --weights ./llava-1.5-7b-hf --pictures FOLDER --dtype float16

For whoever has the weights. It has not been run here: nobody of us has them. FOLDER holds the pictures under the names
that the first command prints, with the addresses that they come from. The texts are those of transformers' own tests,
docstrings and converters; logits are of the first three positions and words, in float16, before any picture. Where a
value was published for 4 bits (bnb4) it is compared up to the place where rounding may change a word, and no further.

The exit status is 1 if something differs, 2 for a mistake, 3 if nothing could be compared.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import llava
from extras import anyres

PICTURES = {  # file → where it comes from
    "view.jpg": "https://llava-vl.github.io/static/images/view.jpg",
    "000000039769.jpg": "http://images.cocodataset.org/val2017/000000039769.jpg",
    "australia.jpg": "https://www.ilankelman.org/stopsigns/australia.jpg",
    "dog.jpg": "https://images.unsplash.com/photo-1552053831-71594a27632d",
    "llama.jpg": "https://images.unsplash.com/photo-1617258683320-61900b281ced",
    "radar.jpg": "https://github.com/haotian-liu/LLaVA/blob/1a91fc274d7c35a9b50b3cb29c4247ae5837ce39/images/"
    "llava_v1_5_radar.jpg?raw=true",
    "compel-neg.png": "the picture of a cat in the documentation of VipLlava",
    "deer.jpg": "the picture of two deer in transformers' test of LlavaNext with pictures of several sizes",
    "chicken_on_money.png": "the integration tests of https://github.com/huggingface/text-generation-inference",
}
VISIT = "What are the things I should be cautious about when I visit this place?"
SHOWN = "What is shown in this image?"
CURIOUS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
CHATML = "<|im_start|>system\n{}<|im_end|>{}<|im_start|>user\n<image>\n" + SHOWN + "<|im_end|>{}<|im_start|>assistant\n"
QWEN = CHATML.format("You are a helpful assistant.", "\n", "\n")
LLAMA_3_NEXT = (  # the header of the user stands there twice, as it was published
    f"<|start_header_id|>system<|end_header_id|>\n\n{HELPFUL}<|eot_id|><|start_header_id|><|start_header_id|>user"
    f"<|end_header_id|>\n\n<image>\n{SHOWN}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
SEVEN, BAK, VIP = "llava-hf/llava-1.5-7b-hf", "llava-hf/bakLlava-v1-hf", "llava-hf/vip-llava-7b-hf"
INTERLEAVE = "llava-hf/llava-interleave-qwen-0.5b-hf"
MISTRAL, VICUNA = "llava-hf/llava-v1.6-mistral-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
ONE = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
BRING, CATS = f"{VISIT} What should I bring with me?", "000000039769.jpg"
DIFFERENCE = "user\n<image><image>\nWhat is the difference between these images?<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Case:
    """What is published of one prompt. None and empty: nothing."""

    checkpoint: str
    prompt: str
    pictures: list = field(default_factory=list)
    new: int = 0  # new tokens, greedy
    begins: str = ""  # how the answer begins
    logits: list | None = None  # of positions 0 to 2, of words 0 to 2
    tolerance: float = 1e-3
    positions: int | None = None  # of text and pictures together
    pixels: tuple | None = None  # the shape of pixel_values
    sizes: list | None = None  # image_sizes
    ids: list | None = None
    answer: list | None = None  # the ids of the answer
    in_tiles: bool = False  # OneVision: each of several pictures in tiles, as the reference does it with a flat list


CASES = [
    Case(SEVEN, "USER: <image>\nWhat's the content of the image? ASSISTANT:", ["australia.jpg"], 15,
         "The image features a busy city street with a stop sign prominently displayed"),
    Case(SEVEN, "<image>\nUSER: Describe the image.\nASSISTANT:", ["dog.jpg"], 20, "The image features a"),
    Case(SEVEN, "<image>\nUSER: Describe the image.\nASSISTANT:", ["llama.jpg"], 20, "The image features a lone"),
    Case(SEVEN, f"USER: <image>\n{VISIT} ASSISTANT:", ["view.jpg"], 40, "When visiting this place, which"),
    Case(SEVEN, "USER: <image>\nWhat is this? ASSISTANT:", ["000000039769.jpg"], 20, "The image features two cats"),
    Case(SEVEN, "<image>\nUSER: What's the content of the image?\nASSISTANT:", ["australia.jpg"], 12,
         "The image features a stop sign on a street corner"),
    Case(SEVEN, f"USER: <image>\n{BRING} ASSISTANT:", ["view.jpg"], 20, "When visiting this place, which is a pier or"),
    Case(SEVEN, f"USER: <image>\n{BRING}\nASSISTANT:", ["view.jpg"], 20, "When visiting this place, which appears"),
    Case(SEVEN, "USER: <image>\nWhat is this?\nASSISTANT:", [CATS], 20, "The image features two cats"),
    Case(SEVEN, "USER: <image>\nWhat is this?\nASSISTANT: Two cats lying on a bed!\nUSER: <image>\nAnd this?\n"
         "ASSISTANT:", [CATS, "view.jpg"], 20, "A cat sleeping on a bed."),
    Case(SEVEN, "<image>\n<image>\nUSER: What's the difference of two images?\nASSISTANT:",
         ["dog.jpg", "llama.jpg"], 20,
         "The difference between the two images is that one of them has a dog standing on a field, while"),
    Case(SEVEN, "<image>\n<image>\nUSER: What's the the difference of two images?\nASSISTANT:",  # in float32
         ["dog.jpg", "llama.jpg"], 20, "In the two images, the primary difference is the presence of a small dog"),
    Case(BAK, f"USER: <image>\n{BRING}\nASSISTANT:", ["view.jpg"], 20,
         "When visiting this place, there are a few things to be cautious about"),
    Case("xtuner/llava-phi-3-mini-hf", "USER: <image>\nWhat are these?\nASSISTANT:", [CATS], 12,
         "These are two cats sleeping on a pink couch."),
    Case(BAK, f"<image>\nUSER: {VISIT}\nASSISTANT:", ["view.jpg"], 20,
         "When visiting this place, there are a few things one should be cautious about. Firstly,",
         ids=[1, 32000, 28705, 13, 11123, 28747, 1824, 460, 272, 1722, 315, 1023, 347, 13831, 925, 684, 739, 315, 3251,
              456, 1633, 28804, 13, 4816, 8048, 12738, 28747]),
    Case(BAK, "USER: <image>\nWhat is this?\nASSISTANT:", ["000000039769.jpg"], 20, "Cats"),
    Case(INTERLEAVE, "<|im_start|>user\n<image>\nWhat are these?<|im_end|>\n<|im_start|>assistant",
         ["000000039769.jpg"], 30,
         "The image shows two cats, one on the left and one on the right. They appear to be resting or sleeping on a "
         "pink blanket. The cat"),
    Case(VIP, f"{CURIOUS}###Human: <image>\nCan you please describe this image?###Assistant:", ["compel-neg.png"], 20,
         "The image features a brown and white cat sitting on a green surface, with a red ball in its"),
    Case(VIP, "USER: <image>\nCan you please describe this image?\nASSISTANT:", ["compel-neg.png"], 10,
         "The image features a brown and white cat sitting on"),
    Case(MISTRAL, f"[INST] <image>\n{SHOWN} [/INST]", ["radar.jpg"], 100,
         "The image appears to be a radar chart, which is a type of multi-dimensional plot that displays data in the "
         "form of a two-dimensional chart of three or more quantitative variables",
         [[-4.8555, -4.6992, -0.1996], [-10.5703, -10.7344, -2.7246], [-7.0391, -7.3672, -0.2634]], 1e-4,
         sizes=[[899, 1024]]),
    Case(MISTRAL, f"[INST] <image>\n{SHOWN} [/INST]", ["000000039769.jpg"], 20,
         "The image shows two cats lying on a pink surface, which appears to be a couch"),
    Case(MISTRAL, f"[INST] <image>\n{SHOWN} [/INST]", ["deer.jpg"], 50,
         "The image shows two deer, likely fawns, in a grassy area with trees in the background. The setting appears"),
    Case(MISTRAL, "User:<image>Can you tell me a very short story based on the image?", ["chicken_on_money.png"], 10,
         "Once upon a time, there was a", answer=[13, 13, 16114, 3714, 264, 727, 28725, 736, 403, 264]),
    Case(VICUNA, f"{CURIOUS} USER: <image>\n{SHOWN} ASSISTANT:", ["radar.jpg"], 100,
         "The image appears to be a graphical representation of a benchmarking study comparing the performance of "
         "various models or systems.",
         [[1.4883, 0.9976, -0.6992], [-9.7031, -5.7031, -1.5557], [-5.1328, -5.5586, 8.8281]], 1e-4,
         sizes=[[899, 1024]]),
    Case("llava-hf/llava-v1.6-vicuna-13b-hf", f"{CURIOUS} USER: <image>\n{SHOWN} ASSISTANT:", ["radar.jpg"], 100,
         "The image appears to be a radar chart, also known as a spider chart or star chart, which is a graphical "
         "method of displaying multivariate data in the form of a two-dimensional chart",
         [[-0.9614, 7.3125, 0.2106], [-7.2695, -8.5469, 3.6211], [-6.3750, -8.1875, 5.4688]], 1e-4,
         sizes=[[899, 1024]]),
    Case("llava-hf/llava-v1.6-34b-hf", CHATML.format("Answer the questions.", "", ""), ["radar.jpg"], 100,
         "The image appears to be a radar chart, also known as a spider chart",
         [[-9.0859, -9.1406, 5.9453], [-5.9570, -5.9766, 2.2754], [-5.7305, -5.7539, 4.0000]], 1e-4,
         sizes=[[899, 1024]]),
    Case("llava-hf/llama3-llava-next-8b-hf", LLAMA_3_NEXT, ["radar.jpg"], 100,
         "The image shows a radar chart, also known as a spider chart or a web chart",
         [[-3.9648, 1.1396, 3.3145], [-5.3594, -1.5654, -1.9619], [-12.3750, -10.6797, -9.3125]], 1e-4,
         sizes=[[899, 1024]]),
    Case("llava-hf/llava-next-72b-hf", QWEN, ["radar.jpg"], 100,
         "The image displays a radar chart, also known as a spider chart or a star chart",
         [[3.7148, 3.9277, 3.4395], [-0.4341, 1.1387, 6.5117], [3.2324, 3.4688, 4.1133]], 1e-4),
    Case("llava-hf/llava-next-110b-hf", QWEN, ["radar.jpg"], 100,
         "The image shows a radar chart comparing the performance of different models on various visual question "
         "answering (VQA) benchmarks.",
         [[-2.5449, -1.6738, -2.0371], [1.0811, 3.4961, 5.0312], [1.7803, 2.5137, 2.4277]], 1e-4),
    Case(ONE, QWEN, ["radar.jpg"], 100,
         "The image is a radar chart that compares the performance of different models in a specific task, likely "
         "related to natural language processing or machine learning. The chart is divided into different categories",
         [[-12.0234, -14.3828, -12.7500], [2.3594, 1.0000, 3.9336], [3.6582, 4.7148, 9.1172]], 1e-4),
    Case(ONE, "user\n<image>\nWhat do you see in this image?<|im_end|>\n<|im_start|>assistant\n", ["radar.jpg"], 100,
         "The image is a radar chart that compares the performance of different models in a specific task, likely "
         "related to natural language processing or machine learning. The chart is divided into several axes, each "
         "representing a different model or method.",
         [[-12.3125, -14.5625, -12.8750], [3.4023, 5.0508, 9.5469], [3.5762, 4.4922, 7.8906]],
         positions=6567, pixels=(1, 10, 3, 384, 384), sizes=[[899, 1024]]),
    Case(ONE, "user\n<image>\nWhat do you see in this image?<|im_end|>\n<|im_start|>assistant\n",
         ["000000039769.jpg"], 50,
         "In the tranquil setting of this image, two cats are enjoying a peaceful nap on a vibrant pink blanket."),
    Case(ONE, DIFFERENCE, ["radar.jpg", "australia.jpg"], 40,
         "The images you've provided appear to be related to a graphical representation of a radar chart",
         in_tiles=True),
    Case(ONE, DIFFERENCE, ["australia.jpg", "radar.jpg"], 40,
         "The first image shows a stop sign with a traditional Chinese architectural background, while the second "
         "image displays a radar chart with various algorithms and models"),
    Case(ONE, "user\nTell me about the french revolution.<|im_end|>\n<|im_start|>assistant\n", new=40,
         begins="The French Revolution! A pivotal event in modern history that had a profound impact on the course of "
         "Western civilization."),
    Case("llava-hf/llava-onevision-qwen2-0.5b-si-hf", QWEN, ["radar.jpg"], logits=[
        [-12.1953, -14.6797, -12.7891], [0.5840, -0.8467, 1.3799], [3.6055, 4.5430, 9.9062]], tolerance=1e-4),
    Case("llava-hf/llava-onevision-qwen2-7b-si-hf", QWEN, ["radar.jpg"], logits=[
        [1.7656, 3.3418, 1.4033], [0.0757, 0.7427, 3.5098], [6.7109, 5.6797, 9.3828]], tolerance=1e-4),
    Case("llava-hf/llava-onevision-qwen2-7b-ov-hf", QWEN, ["radar.jpg"], 100,
         "The image shows a radar chart, also known as a spider chart or a star chart, which is used to compare "
         "multiple quantitative variables.",
         [[1.8496, 3.4219, 1.3135], [3.0996, 3.0117, 3.1484], [4.2422, 4.7109, 9.9688]], 1e-4),
    Case("llava-hf/llava-onevision-qwen2-7b-ov-chat-hf", QWEN, ["radar.jpg"], logits=[
        [1.8662, 3.4316, 1.3174], [2.7109, 2.5488, 3.0117], [4.4648, 4.9648, 10.3359]], tolerance=1e-4),
]  # fmt: skip


def in_tiles(inputs, images, processor):
    """What a Processor makes of several pictures, but each of them in tiles: the number of its placeholders says so."""
    plan = anyres.plan(processor.config)
    pictures = anyres.prepare([processor.open_image(image) for image in images], processor.preprocess_config, plan)
    counts = iter(anyres.counts(pictures["image_sizes"], plan))
    copies = [next(counts) if i == processor.image_id else 1 for i in inputs["input_ids"][0].tolist()]
    ids = inputs["input_ids"].repeat_interleave(torch.tensor(copies), dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}


def compare(case, model, processor, folder):
    """Yield (what is compared, whether it is as published, ours, published) of one case."""
    images = [folder / name for name in case.pictures]
    inputs = processor(case.prompt, images or None)
    if case.in_tiles:
        inputs = in_tiles(inputs, images, processor)
    if case.ids is not None:
        ids = inputs["input_ids"][0].tolist()
        yield "ids", ids == case.ids, ids, case.ids
    if case.pixels is not None:
        shape = tuple(inputs["pixel_values"].shape)
        yield "pixel_values", shape == case.pixels, shape, case.pixels
    if case.sizes is not None:
        sizes = inputs["image_sizes"].tolist()
        yield "image_sizes", sizes == case.sizes, sizes, case.sizes
    if case.positions is not None:
        positions = model.prompt_ids(**inputs)[0].shape[1]
        yield "positions", positions == case.positions, positions, case.positions
    if case.logits is not None:
        with torch.no_grad():
            ours = model(**inputs, logits_to_keep=torch.arange(3, device=model.device)).logits[0, :, :3].float().cpu()
        same = bool(((ours - torch.tensor(case.logits)).abs() <= case.tolerance).all())
        yield "logits", same, [[round(x, 4) for x in row] for row in ours.tolist()], case.logits
    if case.begins or case.answer:
        new = model.generate(**inputs, max_new_tokens=case.new)[0].tolist()
        text = processor.decode(new).strip()
    if case.answer is not None:
        yield "answer", new == case.answer, new, case.answer
    if case.begins:
        yield "text", text.startswith(case.begins), text[: len(case.begins)], case.begins


def run(cases, model, processor, folder):
    """Print what compare finds of all cases → how many agree, how many do not."""
    agreed = differed = 0
    for case in cases:
        missing = [name for name in case.pictures if not (folder / name).is_file()]
        print(f"{case.prompt!r:.100}{' …' if len(repr(case.prompt)) > 100 else ''}")
        if missing:
            print(f"  skipped: {folder} holds no {missing[0]} ({PICTURES.get(missing[0], 'unknown')})")
            continue
        for name, same, ours, published in compare(case, model, processor, folder):
            agreed, differed = agreed + same, differed + (not same)
            print(f"  {name}: as published" if same else f"  {name}: ours {ours!r}\n    published {published!r}")
    return agreed, differed


def overview():
    for checkpoint in dict.fromkeys(case.checkpoint for case in CASES):
        own = [case for case in CASES if case.checkpoint == checkpoint]
        kinds = [name for name in ("ids", "pixels", "sizes", "positions", "logits", "answer", "begins") if
                 any(getattr(case, name) for case in own)]  # fmt: skip
        print(f"{checkpoint}: {len(own)} prompts, {', '.join(kinds)}".replace("begins", "texts"))
    print("pictures:")
    for name, source in PICTURES.items():
        print(f"  {name}  {source}")


def main(arguments=None, cases=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="one of those that are listed without it")
    parser.add_argument("--weights", help="a folder that holds them (default: the Hub's cache, or the Hub)")
    parser.add_argument("--pictures", type=Path, default=Path("pictures"), help="a folder (default: %(default)s)")
    parser.add_argument("--dtype", default="float16", help="the values were made in float16 (default)")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    if options.checkpoint is None:
        overview()
        return 0
    own = [case for case in cases or CASES if case.checkpoint == options.checkpoint]
    if not own:
        print(f"error: nothing is known of {options.checkpoint}: without it, what is known is listed", file=sys.stderr)
        return 2
    try:
        weights = options.weights or options.checkpoint
        model, processor = llava.load(weights, device=options.device, dtype=options.dtype)
        agreed, differed = run(own, model, processor, options.pictures)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{agreed} as published, {differed} different")
    return 1 if differed else 0 if agreed else 3


if __name__ == "__main__":
    sys.exit(main())
