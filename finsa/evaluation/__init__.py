"""Metrics, statistics, tables, figures and reports."""
