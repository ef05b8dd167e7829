"""Traces of runs: `records` (what one holds), `writer`, `reader`, and two views of it, `show` and `page`."""

from stars.trace.reader import read_trace
from stars.trace.records import FORMAT, VERSION, TraceAttempt, TraceCompletion, TraceRequest, TraceSegment
from stars.trace.writer import metrics_record, request_trace, trace_header, trace_lines, trace_records, write_trace

__all__ = ["FORMAT", "VERSION", "TraceAttempt", "TraceCompletion", "TraceRequest", "TraceSegment", "metrics_record",
           "read_trace", "request_trace", "trace_header", "trace_lines", "trace_records", "write_trace"]
