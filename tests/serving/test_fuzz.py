"""No request, however odd, makes the server fail: over 2,000, drawn from its OpenAPI document."""

import collections

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

CASES = {"POST": 500, "GET": 60}  # of each route of this method


def test_no_request_makes_the_server_fail(served):
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    statuses = collections.Counter()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=CASES[operation.method.upper()],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def attempt(case):
            if isinstance(case.body, dict) and "model" in case.body and len(str(case.body)) % 2:
                case.body["model"] = "ours"  # else no request would get further than its model
            answer = case.call(timeout=60)
            case.validate_response(answer, checks=[not_a_server_error])
            statuses[case.path, answer.status_code] += 1

        attempt()
    assert {status for _, status in statuses} >= {200, 400, 404}
    assert statuses["/v1/completions", 200] > 0, statuses
