"""Detectors that no kept library has, as plain modules: network and inference, no training.

These files import torch, torchvision and each other (relatively), nothing else, because they are copied into every student's
folder that needs them. A model takes its backbone (a module that maps images to an ordered dictionary of maps) ready-made and
behaves as torchvision's do: ``model([image, ...])`` in eval mode gives a list of ``boxes``, ``scores`` and ``labels``, where
label 0 is the background. Assignment and losses live in the adapter of the same name.
"""
