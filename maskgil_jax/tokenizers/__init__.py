"""Image tokenizers: images to grids of discrete codes, and codes back to images.

On the training path they turn images into tokens; on the generation path they turn the decoded
tokens into pixels. Every tokenizer is a composition of two nets and a quantiser behind one
contract, `maskgil_jax.tokenizers.base.Tokenizer`.
"""
