"""Runners that make something a method or a model needs: artefacts, tables of bits, the reference model."""
