"""Queries and keys to block mass, by one of the estimators of `registry.ESTIMATORS`: `RRConfig(pool=...)` names it."""

from collections.abc import Callable
from functools import partial

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from mask_mods import hides_keys, seeing_queries, visible_keys
from rr_flex import mass
from rr_flex.geometry import ceil_div
from rr_flex.mass import Samples, block_mass, row_share
from rr_flex.mass_by_attention import FEATURES, block_mass_by_attention, kernel_can_estimate
from rr_flex.registry import ESTIMATORS, estimator
from rr_flex.request import Request
from rr_flex.sampling import pooled_features, sample_queries, with_square

Mass = Float[Tensor, "B Hq nQ nK"]


def estimate_mass(q: Float[Tensor, "B Hq Lq D"], k: Float[Tensor, "B Hkv Lk D"], request: Request) -> Mass:
    """Block mass by the request's estimator; a soft cap bounds what stands for a stride's logits, with order 2 their
    mean and variance together."""
    return ESTIMATORS[request.config.pool].estimate(q, k, request)


def in_strips(q: Tensor, k: Tensor, request: Request) -> bool:
    """Whether scores are stored, and of so many that they are held for a strip of block rows at a time.

    Then a graph would be of one length, and mass is found ahead of it. On a GPU that is so where no kernel takes the
    features: more than 256 of them, which head dim 256 has at order 2.
    """
    config, (Hq, D) = request.config, (q.shape[1], q.shape[3])
    pooled_keys = (config.order * D, config.strides)
    pooled_queries = ((config.order if config.pool == "queries" else 1) * D, (config.tokens_per_pooled_query, 1))
    scored = {"keys": [pooled_keys], "queries": [pooled_queries], "both": [pooled_keys, pooled_queries]}
    for features, (q_stride, k_stride) in scored.get(config.pool, []):
        if request.estimate == "by kernel" and q.device.type == "cuda" and FEATURES[0] <= features <= FEATURES[1]:
            continue
        if q.shape[0] * Hq * ceil_div(q.shape[2], q_stride) * ceil_div(k.shape[2], k_stride) > mass.STRIP_ELEMENTS:
            return True
    return False


@estimator("keys", reads=("stride", "query_stride", "key_stride", "order", "variance_weight"))
def by_pooled_keys(q: Tensor, k: Tensor, request: Request) -> Mass:
    """RRAttention's: one query a stride, keys pooled to their mean; at order 2 to mean and variance."""
    config = request.config
    queries = sample_queries(q, config.strides[0], request.head_offset)
    valid = valid_keys_of(request, q, k)
    keys = request.pooled_keys
    if keys is None:
        keys = pooled_features(k, config.strides[1], config.order, valid)
    if config.order == 2:
        queries = with_square(queries, config.variance_weight * request.scale)
    return _form(queries, request)(_samples(q, k, request, queries, keys)._replace(valid_keys=valid))


@estimator("queries", reads=("query_pool", "order", "variance_weight"))
def by_pooled_queries(q: Tensor, k: Tensor, request: Request) -> Mass:
    """A block's queries pooled to their mean, at order 2 to mean and variance; every key scored on its own."""
    return _by_pooled_queries(q, k, request, request.config.order)


@estimator("both", reads=("stride", "query_stride", "key_stride", "query_pool", "order", "variance_weight"))
def by_both(q: Tensor, k: Tensor, request: Request) -> Mass:
    """The mean of the two estimates' shares of a row.

    Beside pooled keys, whose second order it would repeat, the mean query alone is as good (notebooks/README.md).
    """
    return (row_share(by_pooled_keys(q, k, request)) + row_share(_by_pooled_queries(q, k, request, 1))) / 2


def _by_pooled_queries(q: Tensor, k: Tensor, request: Request, order: int) -> Mass:
    config = request.config
    stride = config.tokens_per_pooled_query
    queries = pooled_features(q, stride, order, queries_that_see(q, k, request))
    keys = k if order == 1 else with_square(k, config.variance_weight * request.scale)
    valid = valid_keys_of(request, q, k)
    if valid is not None:
        keys = torch.where(valid[..., None], keys, 0)  # what stands in padding, NaN too, does not count
    samples = _samples(q, k, request, queries, keys)
    return _form(queries, request)(samples._replace(strides=(stride, 1), stands_for="all"))


def _samples(q: Tensor, k: Tensor, request: Request, queries: Tensor, keys: Tensor) -> Samples:
    config = request.config
    return Samples(
        queries,
        keys,
        strides=config.strides,
        seq_lengths=(q.shape[2], k.shape[2]),
        block_size=config.block_sizes,
        mask_mod=request.mask_mod,
        scale=request.scale,
        head_offset=request.head_offset,
        softcap=request.softcap,
        ends=request.ends,
    )


def _form(features: Tensor, request: Request) -> Callable[[Samples], Mass]:
    """The kernel's form of the estimate where there is one for these features and something is compiled."""
    if request.estimate == "plain":
        return partial(block_mass, compiled=False)
    return block_mass_by_attention if kernel_can_estimate(features) else block_mass


def valid_keys_of(request: Request, q: Tensor, k: Tensor) -> Bool[Tensor, "b #Hkv Lk"] | None:
    """False for keys that no query of a group may see; None where there are none such."""
    (B, Hq, _, _), (Hkv, Lk) = q.shape, k.shape[1:3]
    if not hides_keys(request.mask_mod):
        return None
    valid = visible_keys(request.mask_mod, B, Hq, Lk, q.device)
    return valid if valid.shape[1] == 1 else reduce(valid.int(), "b (g r) k -> b g k", "max", g=Hkv).bool()


def queries_that_see(q: Tensor, k: Tensor, request: Request) -> Bool[Tensor, "b h Lq"]:
    """False for queries that see nothing (padding), which must not be pooled."""
    (B, Hq, Lq, _), Lk = q.shape, k.shape[2]
    return seeing_queries(request.mask_mod, B, Hq, Lq, Lk, q.device)
