"""Attention over packed rows, on one device or spread over the mesh axis `sp`: one entry, several schedules."""

from lwm_train.attention.decode import decode_attention
from lwm_train.attention.dispatch import attention
from lwm_train.attention.order import token_order

__all__ = ["attention", "decode_attention", "token_order"]
