"""Teachers: from a Hugging Face config and weights to HybridForCausalLM. One file a family.

The public names are in :mod:`mambify.families.load`.
"""
