"""What OpenAI's API promises, row by row, with the tests that show it here, or the reason why it is not served.

``page`` makes docs/reference/api-conformance.md of it. Called by: ``tools/conformance.py --write`` and its test.
"""

from __future__ import annotations

from typing import NamedTuple

LIVE, REQUESTS, ERRORS = "test_api_live", "test_api_requests", "test_api_errors"
FILES, BATCHES, EMBED = "test_api_files", "test_api_batches", "test_api_embeddings"
LIMITS, AGAIN, HOOKS = "test_api_ratelimits", "test_api_idempotency", "test_webhooks"
RESPONSES, KEPT, STREAM = "test_api_responses", "test_responses_kept", "test_responses_stream"
OPENAPI, CONFORMS = "test_openapi", "test_conformance"


class Row(NamedTuple):
    """One promise: shown by ``tests``, or not kept for the reason ``why``; with both, kept in part."""

    what: str
    tests: tuple[tuple[str, str], ...] = ()
    why: str = ""


SECTIONS: dict[str, list[Row]] = {
    "The wire": [
        Row("base URL with `/v1`, key as `Authorization: Bearer`", ((ERRORS, "test_every_route_needs_a_key"),)),
        Row("`OpenAI-Organization`, `OpenAI-Project`", (), "read by nobody: a key belongs to one account"),
        Row("total time limit of 600 s, connect 5 s", ((LIVE, "test_silence_is_bridged_by_comments"),)),
        Row(
            "retries on 408, 409, 429 and from 500 on",
            ((LIVE, "test_a_503_from_the_cell_says_when_to_try_again"), (CONFORMS, "test_the_programs_pass")),
        ),
        Row("`x-should-retry`", ((ERRORS, "test_full_books_are_said_so_and_not_tried_again"),)),
        Row(
            "`retry-after-ms` and `retry-after`, never over 120 s",
            (
                (LIVE, "test_no_vehicle_is_said_before_the_first_byte_with_a_time_to_wait"),
                (LIMITS, "test_too_many_requests_get_a_429_that_the_client_understands"),
            ),
        ),
        Row("`x-stainless-*` of the client", (), "accepted and not read"),
        Row(
            "`Idempotency-Key`, which OpenAI's client can be told to send",
            ((AGAIN, "test_the_same_request_is_done_once_and_answered_alike"),),
        ),
        Row(
            "`x-request-id` on every answer",
            ((ERRORS, "test_request_ids_differ"), (OPENAPI, "test_errors_are_as_described")),
        ),
        Row("`openai-processing-ms`, `openai-version`", ((OPENAPI, "test_real_answers_are_as_described"),)),
        Row("a status for each exception of the client", ((ERRORS, "test_the_official_client_raises_its_own_error"),)),
        Row("the error envelope with all four keys", ((OPENAPI, "test_errors_are_as_described"),)),
        Row("409 while the same request is running", ((AGAIN, "test_while_the_first_one_runs_the_second_is_told_so"),)),
    ],
    "Streams": [
        Row("ends with `[DONE]`", ((LIVE, "test_a_stream_has_the_documented_shape"),)),
        Row(
            "an error after the first byte is an event with `error`",
            ((LIVE, "test_an_error_after_the_first_token_is_an_event"),),
        ),
        Row("comment lines keep the connection alive", ((LIVE, "test_silence_is_bridged_by_comments"),)),
        Row("a client that leaves ends the work", ((LIVE, "test_a_client_that_leaves_ends_the_work"),)),
        Row(
            "one id, the role first, the reason last, usage at the end",
            ((LIVE, "test_a_stream_has_the_documented_shape"),),
        ),
        Row(
            "usage over all vehicles, and no prompt billed twice",
            (("test_cell_live", "test_a_stream_goes_on_where_its_vehicle_left_it"),),
        ),
    ],
    "`/v1/models`": [
        Row("list and retrieve, ids with slashes", ((LIVE, "test_models_are_listed_and_shown"),)),
        Row("`DELETE /v1/models/{model}`", (), "models belong to the operator, and customers train none"),
        Row("`shutdown_date`", (), "optional; no model has one"),
    ],
    "`/v1/chat/completions`": [
        Row("`max_completion_tokens` and `max_tokens`", ((REQUESTS, "test_bad_chats_are_refused_by_name"),)),
        Row("`n`, billed over all choices", ((LIVE, "test_several_choices_stop_and_logprobs"),)),
        Row("`stop`, up to four", ((LIVE, "test_several_choices_stop_and_logprobs"),)),
        Row(
            "`seed` with `system_fingerprint`",
            ((LIVE, "test_a_new_engine_in_mid_stream_changes_the_fingerprint_alone"),),
        ),
        Row("`logprobs`, `top_logprobs`", ((LIVE, "test_logprobs_come_with_their_tokens"),)),
        Row("`logit_bias`", ((REQUESTS, "test_good_chats_pass"),)),
        Row("`response_format`", ((LIVE, "test_a_json_schema_reaches_the_engine"),)),
        Row("`tools`, `tool_choice`: functions", ((LIVE, "test_a_stream_that_may_call_tools_comes_in_one_piece"),)),
        Row("`reasoning_effort`, `verbosity`", ((REQUESTS, "test_good_chats_pass"),)),
        Row("`service_tier`", (("test_streams", "test_service_tiers_have_their_class"),)),
        Row("`metadata`", ((REQUESTS, "test_good_chats_pass"),)),
        Row("`stream_options.include_usage`", ((LIVE, "test_a_stream_has_the_documented_shape"),)),
        Row(
            "`stream_options.include_obfuscation`",
            ((REQUESTS, "test_good_chats_pass"),),
            "accepted, and nothing is added",
        ),
        Row(
            "`functions`, `function_call`",
            ((REQUESTS, "test_bad_chats_are_refused_by_name"),),
            "refused by name: deprecated",
        ),
        Row(
            "`audio`, `modalities` beyond text",
            ((REQUESTS, "test_bad_chats_are_refused_by_name"),),
            "refused by name: the models are of text",
        ),
        Row(
            "`store`, and the list of stored completions", (), "accepted, and nothing is stored: `/v1/responses` stores"
        ),
        Row(
            "`prediction`, `web_search_options`, `moderation`", (), "passed on to the engine, which leaves them unread"
        ),
        Row("the answer's shape", ((OPENAPI, "test_real_answers_are_as_described"),)),
    ],
    "`/v1/completions`": [
        Row("every form of `prompt`", ((REQUESTS, "test_prompts_come_in_every_shape"),)),
        Row("`echo`", ((LIVE, "test_echo_begins_each_choice_with_its_prompt"),)),
        Row("the older parallel arrays of `logprobs`", ((LIVE, "test_completion_streams_have_the_older_arrays"),)),
        Row(
            "`best_of` other than `n`, `suffix`",
            ((REQUESTS, "test_bad_completions_are_refused_by_name"),),
            "refused by name: no engine here has them",
        ),
    ],
    "`/v1/embeddings`": [
        Row("text, texts, tokens, lists of tokens", ((EMBED, "test_every_form_of_input"),)),
        Row("at most 2048 inputs, none empty", ((EMBED, "test_what_cannot_be_embedded_is_named"),)),
        Row(
            "the longest input; 300,000 tokens a request",
            ((EMBED, "test_the_real_model_names_what_it_cannot_do"),),
            "an input has the model's limit; all of them together the limit of a body",
        ),
        Row(
            "`base64`, which the client asks for by itself",
            ((EMBED, "test_the_default_client_gets_vectors_of_length_one"),),
        ),
        Row("`float`", ((EMBED, "test_both_formats_hold_the_same_numbers"),)),
        Row("`dimensions`", ((EMBED, "test_shorter_vectors_where_the_model_has_them"),)),
        Row(
            "vectors of length 1, those of the model",
            ((EMBED, "test_the_real_model_says_what_its_original_weights_say"),),
        ),
    ],
    "`/v1/responses`": [
        Row("create with text and tools", ((RESPONSES, "test_a_function_is_called_and_its_output_read"),)),
        Row("every required key", ((RESPONSES, "test_a_response_has_every_field_that_openai_requires"),)),
        Row("stream of events, each with its number", ((STREAM, "test_a_text"),)),
        Row(
            "background, and a stream that goes on after `starting_after`",
            ((STREAM, "test_the_rest_of_a_stream_after_every_event_of_it"),),
        ),
        Row("retrieve, delete", ((KEPT, "test_a_deleted_response_is_gone"),)),
        Row("cancel", ((KEPT, "test_cancelling"),)),
        Row("input items", ((KEPT, "test_input_items_in_pages"),)),
        Row("`previous_response_id`", ((KEPT, "test_a_conversation_is_rebuilt_from_what_is_kept"),)),
        Row("an empty probe", ((RESPONSES, "test_a_probe_without_input_is_answered"),)),
        Row(
            "tools that are no functions are skipped",
            ((RESPONSES, "test_tools_that_openai_runs_are_left_out_and_named"),),
        ),
        Row("an unknown `previous_response_id`", ((KEPT, "test_a_conversation_with_a_gap_is_refused"),)),
        Row(
            "`/v1/responses/input_tokens`, `/compact`", (), "not served: only the engine on a vehicle knows the tokens"
        ),
        Row(
            "the WebSocket `connect`",
            ((ERRORS, "test_a_websocket_is_turned_away"),),
            "not served: streams of events do the same",
        ),
        Row(
            "`conversation`, `prompt`",
            ((RESPONSES, "test_what_cannot_be_served_is_refused_by_name"),),
            "refused by name: OpenAI keeps these objects",
        ),
    ],
    "`/v1/files`": [
        Row("upload with `purpose` and `expires_after`", ((FILES, "test_bad_forms_are_refused_by_name"),)),
        Row("the file object", ((OPENAPI, "test_real_answers_are_as_described"),)),
        Row("512 MB, and 200 MB for batches", ((FILES, "test_a_file_at_its_limit_is_accepted"),)),
        Row(
            "2.5 TB a project, 1,000 uploads a minute", (), "the operator's disk is the limit; it is answered with 507"
        ),
        Row("list with `after`, `limit`, `order`, `purpose`", ((FILES, "test_files_are_listed_in_pages"),)),
        Row(
            "retrieve, delete, content",
            ((FILES, "test_a_file_comes_back_as_it_went"), (FILES, "test_a_deleted_file_is_gone_with_its_bytes")),
        ),
        Row("batch files expire after 30 days", ((FILES, "test_batch_files_expire_after_30_days_by_default"),)),
    ],
    "`/v1/batches`": [
        Row("create, with `metadata` and `output_expires_after`", ((BATCHES, "test_a_bad_batch_is_refused_by_name"),)),
        Row("for chat completions and completions", ((BATCHES, "test_completions_are_served_in_batches"),)),
        Row("for embeddings", (("test_api_embedding_batches", "test_embeddings_run_in_a_batch"),)),
        Row("for moderations, images, videos", (), "there is no such endpoint here"),
        Row(
            "50,000 lines, 200 MB, one model, unique `custom_id`",
            ((BATCHES, "test_too_many_lines_are_refused"), (BATCHES, "test_a_bad_line_fails_the_batch_with_its_place")),
        ),
        Row(
            "the batch object, all keys from the start",
            ((BATCHES, "test_every_key_of_a_batch_is_there_from_the_start"),),
        ),
        Row(
            "`validating` to `completed`, `failed`, `expired`, `cancelled`",
            (
                (BATCHES, "test_a_batch_expires_and_says_so_line_by_line"),
                (BATCHES, "test_a_running_batch_is_cancelled"),
            ),
        ),
        Row("output and error lines", ((BATCHES, "test_a_batch_runs_to_its_end"),)),
        Row("list with `after`, `limit`", ((BATCHES, "test_batches_are_listed_in_pages_and_by_account"),)),
        Row(
            "a queue of tokens for each model, 2,000 batches an hour", (), "batches queue without a bound but the disk"
        ),
    ],
    "Webhooks": [
        Row(
            "`batch.completed`, `failed`, `expired`, `cancelled`",
            ((HOOKS, "test_every_end_of_a_batch_makes_one_delivery"),),
        ),
        Row("`response.*` of background responses", ((HOOKS, "test_background_responses_are_told"),)),
        Row(
            "signed so that `webhooks.unwrap` verifies it",
            ((HOOKS, "test_the_end_of_a_batch_is_told_and_the_client_verifies_it"),),
        ),
        Row("retried for three days", ((HOOKS, "test_attempts_are_made_at_growing_intervals_and_then_no_more"),)),
        Row(
            "made, listed, changed, tried and deleted by the client",
            ((HOOKS, "test_webhooks_are_made_listed_changed_and_deleted"),),
        ),
        Row("secrets that change over a day", ((HOOKS, "test_a_secret_is_changed_with_or_without_a_day_of_both"),)),
        Row("events of evals, fine-tuning, video, agents, realtime", (), "there are no such objects here"),
    ],
    "Rate limits": [
        Row(
            "limits, what is left and resets for requests and tokens",
            ((LIMITS, "test_every_answer_of_a_model_says_how_much_is_left"),),
        ),
        Row("resets as durations, `6m0s`", ((LIMITS, "test_durations_are_written_as_openai_does"),)),
        Row(
            "429 with `rate_limit_exceeded`",
            ((LIMITS, "test_too_many_requests_get_a_429_that_the_client_understands"),),
        ),
        Row("`insufficient_quota`", (), "no account has a quota: the operator revokes keys"),
    ],
    "The rest of OpenAI's API": [
        Row(
            "moderations, images, audio, video, realtime, evals, fine-tuning, vector stores, assistants",
            (),
            "vehicles run small models of text and vectors",
        ),
        Row("administration of organisations and projects", (), "`motorpool keys` does what is needed of it"),
    ],
}


def page(programs: list[tuple[str, str, str]]) -> str:
    """docs/reference/api-conformance.md; ``programs`` are name, calls and description."""
    out = [
        "# How far OpenAI's API goes here",
        "",
        "Written by `tools/conformance.py --write`; a test compares it with the code and looks for each named test.",
        "",
        "## Programs",
        "",
        "Short programs, each using openai-python as its README and examples do. `tools/conformance.py` runs them",
        "against a `motorpool dev` that it starts, or any other address, and prints which passed; with `--fuzz 50`",
        "schemathesis also makes fifty requests of each kind to every route of the served `/openapi.json`.",
        "",
        "| program | calls | shows |",
        "| --- | --- | --- |",
    ]
    out += [f"| {name.replace('_', ' ')} | `{calls}` | {shows.strip()} |" for name, calls, shows in programs]
    for title, rows in SECTIONS.items():
        out += ["", f"## {title}", "", "| what | shown by, or why not |", "| --- | --- |"]
        for row in rows:
            tests = [f"`{file}.py::{test}`" for file, test in row.tests]
            shown = "<br>".join([*([row.why] if row.why else []), *tests])
            out.append(f"| {row.what} | {shown} |")
    return "\n".join(out) + "\n"
