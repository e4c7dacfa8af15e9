"""Reads result folders: tables, statistics, figures and reports; needs neither torch nor the rest of the project."""
