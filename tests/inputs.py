"""What several files of tests feed to a model: prompts, pictures, a small decoder, a cache that is filled."""

import torch
from reference import EDGE, FEATURES, IMAGE, PAD, expanded

import llama

PROMPTS = [[1, 40, 41, IMAGE, 42, 43], [1, IMAGE, 44, IMAGE, 45, 46, 47, 48], [1, 50]]  # with 1, 2 and 0 pictures


def alone(batch):
    """The same prompts, one by one."""
    pictures = batch["pixel_values"].split([row.count(IMAGE) for row in PROMPTS])
    return [
        {"input_ids": torch.tensor([row]), "pixel_values": images if len(images) else None}
        for row, images in zip(PROMPTS, pictures, strict=True)
    ]


def reference_generate(reference, batch, eos, **options):
    """transformers' new ids for a batch, in its current form: expanded ids, left-padded."""
    ids, mask, _ = expanded(batch["input_ids"], batch.get("attention_mask"))
    pictures = {"pixel_values": batch["pixel_values"].double()} if "pixel_values" in batch else {}
    options |= {"do_sample": False, "pad_token_id": PAD, "eos_token_id": eos}
    out = reference.generate(input_ids=ids, attention_mask=mask, **pictures, **options)
    return out[:, ids.shape[1] :]


def rare_ends(model, batch, steps=(3, 6)):
    """Ids that the first two rows really generate, at different steps, so that rows end at different times."""
    ids = model.generate(**batch, max_new_tokens=20)
    return [int(ids[row, step]) for row, step in enumerate(steps)]


def small(**changes):
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    return llama.Llama(llama.TextConfig(**sizes | changes)).double()


def filled(rows=3, room=4):
    """A cache of random contents, five positions long, the first two rows padded."""
    cache = llama.init_kv_cache(small(num_key_value_heads=2).config, rows, 5 + room, torch.float64)
    for tensor in cache.values():
        if tensor.is_floating_point():
            tensor[:, :, :5].normal_()
    cache["real"][:, :5] = True
    cache["real"][0, :2] = cache["real"][1, :1] = False
    cache["length"] += 5
    return cache


ROW = [1, 40, IMAGE, 41, 42, IMAGE, 43]  # two pictures: 5 + 2 * 16 = 37 positions
ROWS = [[1, 50, 51, 52, 53, 54], [1, 60, 61, IMAGE, 62, 63, 64], [IMAGE, 1, 70, IMAGE]]  # none, one and two pictures
PICTURES = [0, 1, 2]


def pictures(number, seed=1):
    return torch.randn(number, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(seed))


def padded(rows, side):
    """Rows of ids → ids and mask, padded on one side."""
    longest = max(map(len, rows))
    pads = [[PAD] * (longest - len(row)) for row in rows]
    ids = torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])
    return ids, (ids != PAD).long()


def theirs_of(ids, pixels=None, mask=None, size=FEATURES):
    """The reference's arguments for the same prompts."""
    ids, mask, position_ids = expanded(ids, mask, size)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    return inputs if pixels is None else inputs | {"pixel_values": pixels.double()}


def close(ours, theirs, bound=1e-9):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()
