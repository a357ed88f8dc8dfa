"""Single-file checkpoints in the layout of the code that models were first published with, and diffusers' layout.

``layouts`` says where each weight stands, ``checkpoint`` what a file is, ``template`` what is said beside weights, and
``convert`` makes a diffusers folder of a file. ``finetune.export.single_file`` goes the other way.
"""
