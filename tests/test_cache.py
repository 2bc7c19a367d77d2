"""Tensors come back from the cache as they were put, or not at all."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from people.cache import TensorCache, content_key


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensor_cache(tmp_path, dtype):
    cache = TensorCache(tmp_path / "latents")
    mean = torch.randn(16, 4, 6, generator=generator()).to(dtype).transpose(1, 2)
    assert cache.get("a") is None
    cache.put("a", {"mean": mean, "std": mean + 1})
    got = TensorCache(tmp_path / "latents").get("a")
    assert got["mean"].dtype == dtype
    assert torch.equal(got["mean"], mean) and torch.equal(got["std"], mean + 1)
    file = tmp_path / "latents" / "a.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:length])
        assert cache.get("a") is None
    cache.put("a", {"mean": mean})
    assert torch.equal(cache.get("a")["mean"], mean)


def test_every_flipped_bit_is_noticed(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put("a", {"mean": torch.arange(5.0), "count": torch.tensor(3)})
    file = tmp_path / "a.safetensors"
    whole = file.read_bytes()
    for place, bit in itertools.product(range(len(whole)), range(8)):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        assert cache.get("a") is None and "a" not in cache
    file.write_bytes(whole)
    assert "a" in cache and torch.equal(cache.get("a")["mean"], torch.arange(5.0))


def test_a_file_without_a_checksum_is_no_entry(tmp_path):
    cache = TensorCache(tmp_path)
    save_file({"mean": torch.ones(2)}, tmp_path / "a.safetensors")
    assert "a" not in cache and cache.get("a") is None


def test_keys_differ_with_every_part_of_the_recipe():
    recipes = [(1, "a", [8, 8]), (2, "a", [8, 8]), (1, "b", [8, 8]), (1, "a", [8, 16]), (1, "a", 8, 8)]
    keys = [content_key(*recipe) for recipe in recipes]
    assert len(set(keys)) == len(keys) and content_key(1, "a", (8, 8)) == keys[0]
