"""The Hub's validator accepts the card."""

import pytest
from card_results import a_result
from client import CLIENT

from hfproj.reporting import render_card


@pytest.mark.skipif(CLIENT < (2, 1), reason="older clients validate cards at huggingface.co only")
def test_the_validator_of_the_hub_takes_it(client):
    client("scripts_loopback:card", text=render_card(a_result(), repo_id="me/x", license="apache-2.0"))
