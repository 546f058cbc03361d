"""transformers: packed models through ``AutoModelForCausalLM``, and quantization while it loads.

Importing this package registers the method ``neuqi`` with transformers::

    import neuqi_serve.hf

    model = AutoModelForCausalLM.from_pretrained("PACKED_DIR")
    model = AutoModelForCausalLM.from_pretrained("BF16_DIR", quantization_config=neuqi_serve.hf.NeuqiConfig(bits=3))

transformers has no way for a package to announce a method before it is imported. Without this import it calls the
method unknown in a warning and fills the packed layers with random weights: import it before ``from_pretrained``.
"""

from neuqi_serve.hf.config import NeuqiConfig
from neuqi_serve.hf.quantizer import NeuqiHfQuantizer, register

__all__ = ["NeuqiConfig", "NeuqiHfQuantizer"]

register()
