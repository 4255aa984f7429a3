"""Pictures to latents, captions to what a net is told of them, once and for all: counted, encoded in parts, joined.

A part is written whole or not at all and is a function of the settings and its number alone, so that a killed run goes
on where it was and several processes share the work, to the same bytes. What is written is `data.encoded`'s folder.

sources: where samples are from. census: what there is. texts: what is made of captions. encoder: the engine. files: writing.
"""

from nanodiffusion.encode.encoder import EncodeConfig, Encoder
from nanodiffusion.encode.sources import SETS, Found, Source, open_source, square

__all__ = ["SETS", "EncodeConfig", "Encoder", "Found", "Source", "open_source", "square"]
