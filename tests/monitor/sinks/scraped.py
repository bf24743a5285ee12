"""Reads a Prometheus sink's page as a scraper does."""

import prometheus_client.parser

from monitor.sinks import PrometheusSink
from tests.recorded import page


def families(sink: PrometheusSink) -> dict:
    """What a scraper reads, by name of the metric family."""
    parsed = list(prometheus_client.parser.text_string_to_metric_families(page(sink.url)))
    assert len({family.name for family in parsed}) == len(parsed)
    return {family.name: family for family in parsed}


def values(sink: PrometheusSink, name: str, *labels: str) -> dict:
    """The values of one metric by the given labels."""
    found = {}
    for family in families(sink).values():
        for sample in family.samples:
            if sample.name == name:
                where = tuple(sample.labels[label] for label in labels)
                assert where not in found
                found[where] = sample.value
    return found


def value(sink: PrometheusSink, name: str) -> float:
    """The value of a metric that has one series."""
    ((_, only),) = values(sink, name).items()
    return only
