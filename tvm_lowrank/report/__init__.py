"""What a plan decided as tables, and what forms make of a layer as drawings."""

from tvm_lowrank.report.tables import render, summary

__all__ = ["render", "summary"]
