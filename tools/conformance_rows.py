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
LIMITED, ANSWERS = "test_stream_limits", "test_api_response_batches"


class Row(NamedTuple):
    """One promise: shown by ``tests``, or not kept for the reason ``why``; with both, kept in part."""

    what: str
    tests: tuple[tuple[str, str], ...] = ()
    why: str = ""


SECTIONS: dict[str, list[Row]] = {
    "The wire": [
        Row("base URL with `/v1`, key as `Authorization: Bearer`", ((ERRORS, "test_every_route_needs_a_key"),)),
        Row(
            "`OpenAI-Organization`, `OpenAI-Project`",
            ((CONFORMS, "test_the_programs_pass"),),
            "accepted and read by nobody: a key belongs to one account",
        ),
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
        Row("`x-stainless-*` of the client", ((CONFORMS, "test_the_programs_pass"),), "accepted and not read"),
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
        Row("the error envelope with all four keys, `code` a string", ((OPENAPI, "test_errors_are_as_described"),)),
        Row(
            "codes `invalid_api_key`, `model_not_found`, `context_length_exceeded`",
            (
                (ERRORS, "test_the_official_client_raises_its_own_error"),
                (LIVE, "test_an_unknown_model_is_refused_everywhere"),
                (LIVE, "test_a_prompt_longer_than_the_context_is_refused"),
            ),
        ),
        Row(
            "codes `server_is_overloaded`, `slow_down`",
            ((LIMITED, "test_who_cannot_be_served_in_time_is_told_so_before_the_first_byte"),),
        ),
        Row("`openai-organization` of an answer", (), "not sent: a key belongs to one account"),
        Row("409 while the same request is running", ((AGAIN, "test_while_the_first_one_runs_the_second_is_told_so"),)),
    ],
    "Streams": [
        Row("ends with `[DONE]`", ((LIVE, "test_a_stream_has_the_documented_shape"),)),
        Row(
            "an error after the first byte is an event with `error`",
            ((LIVE, "test_an_error_after_the_first_token_is_an_event"),),
        ),
        Row("comment lines keep the connection alive", ((LIVE, "test_silence_is_bridged_by_comments"),)),
        Row(
            "line ends of every kind, events of up to 64 MiB",
            ((LIVE, "test_each_token_is_sent_at_once"),),
            "what a client has to read: lines end with LF here, and an event holds a few tokens",
        ),
        Row(
            "a cut between two events looks like an end: only `finish_reason` and `[DONE]` tell",
            (("test_stream_continuity", "test_the_official_client_sees_one_answer_wherever_it_was_cut"),),
            "another vehicle goes on",
        ),
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
        Row(
            "`DELETE /v1/models/{model}`",
            ((CONFORMS, "test_what_is_not_served_is_said_so"),),
            "models belong to the operator, and customers train none",
        ),
        Row("`id`, `object`, `created`, `owned_by`", ((OPENAPI, "test_real_answers_are_as_described"),)),
        Row("`shutdown_date`", (), "optional; no model has one"),
        Row(
            "`models` beside `data`, which Codex reads",
            (),
            "OpenAI's own list has none",
        ),
    ],
    "`/v1/chat/completions`": [
        Row(
            "`model`, `messages`",
            ((REQUESTS, "test_missing_fields_are_named"), (REQUESTS, "test_bad_chats_are_refused_by_name")),
        ),
        Row("`max_completion_tokens` and `max_tokens`", ((REQUESTS, "test_bad_chats_are_refused_by_name"),)),
        Row(
            "`temperature`, `top_p`, `frequency_penalty`, `presence_penalty`",
            ((REQUESTS, "test_good_chats_pass"), (REQUESTS, "test_bad_chats_are_refused_by_name")),
        ),
        Row("`n`, billed over all choices", ((LIVE, "test_several_choices_stop_and_logprobs"),)),
        Row("`stop`, up to four", ((LIVE, "test_several_choices_stop_and_logprobs"),)),
        Row(
            "`seed` with `system_fingerprint`",
            ((LIVE, "test_a_new_engine_in_mid_stream_changes_the_fingerprint_alone"),),
        ),
        Row("`logprobs`, `top_logprobs`", ((LIVE, "test_logprobs_come_with_their_tokens"),)),
        Row("`logit_bias`", ((REQUESTS, "test_good_chats_pass"),)),
        Row("`response_format`", ((LIVE, "test_a_json_schema_reaches_the_engine"),)),
        Row(
            "`tools`, `tool_choice`: functions",
            (
                (LIVE, "test_a_whole_answer_with_tool_calls_ends_a_stream_in_one_piece"),
                ("test_stream_tools", "test_each_fragment_leaves_once_however_often_the_vehicle_changes"),
            ),
        ),
        Row(
            "`tools` of the type `custom`",
            (("test_engine_llama", "test_tools_are_not_silently_dropped"),),
            "the engine judges its tools, and refuses by name those that its model would not hear of",
        ),
        Row("`parallel_tool_calls`", ((REQUESTS, "test_good_chats_pass"),), "passed on to the engine"),
        Row("`stream`", ((LIVE, "test_a_stream_says_what_the_plain_answer_says"),)),
        Row("`reasoning_effort`, `verbosity`", ((REQUESTS, "test_good_chats_pass"),)),
        Row(
            "`service_tier`, and the one that was given in the answer",
            (
                ("test_streams", "test_service_tiers_have_their_class"),
                (LIMITED, "test_an_answer_states_the_tier_that_was_given"),
            ),
        ),
        Row(
            "`user`, `safety_identifier`, `prompt_cache_key`, `prompt_cache_options`, `prompt_cache_retention`",
            ((REQUESTS, "test_good_chats_pass"),),
            "accepted and not read: prompts are cached for whoever sends them",
        ),
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
            "the modality is refused by name: the models are of text; what `audio` says of it is not read",
        ),
        Row(
            "`store`, and the routes of stored completions",
            ((CONFORMS, "test_what_is_not_served_is_said_so"),),
            "accepted, and nothing is stored: `/v1/responses` stores",
        ),
        Row(
            "`prediction`, `web_search_options`, `moderation`",
            ((REQUESTS, "test_good_chats_pass"), (LIVE, "test_the_body_reaches_the_cell_byte_for_byte")),
            "passed on to the engine, which leaves them unread",
        ),
        Row("the answer's shape", ((OPENAPI, "test_real_answers_are_as_described"),)),
    ],
    "`/v1/completions`": [
        Row("every form of `prompt`", ((REQUESTS, "test_prompts_come_in_every_shape"),)),
        Row(
            "`model`, `max_tokens`, 16 if it is left out",
            ((REQUESTS, "test_a_completion_has_a_length_also_if_it_names_none"),),
        ),
        Row(
            "`frequency_penalty`, `presence_penalty`, `temperature`, `top_p`, `logit_bias`, `n`, `seed`, `stop`, "
            "`user`",
            ((REQUESTS, "test_bad_chats_are_refused_by_name"),),
            "read by the type that chat completions share",
        ),
        Row(
            "`stream`, `stream_options`, the object `text_completion` in both modes",
            ((LIVE, "test_a_completion_is_answered"), (LIVE, "test_completion_streams_have_the_older_arrays")),
        ),
        Row("`echo`", ((LIVE, "test_echo_begins_each_choice_with_its_prompt"),)),
        Row("the older parallel arrays of `logprobs`", ((LIVE, "test_completion_streams_have_the_older_arrays"),)),
        Row(
            "`best_of`, only equal to `n`; `suffix`",
            ((REQUESTS, "test_bad_completions_are_refused_by_name"),),
            "refused by name: no engine here has them",
        ),
    ],
    "`/v1/embeddings`": [
        Row(
            "`model`, one that makes embeddings",
            ((EMBED, "test_a_model_of_text_makes_no_embeddings"), (EMBED, "test_what_cannot_be_embedded_is_named")),
        ),
        Row("`input`: text, texts, tokens, lists of tokens", ((EMBED, "test_every_form_of_input"),)),
        Row("`user`", ((CONFORMS, "test_the_programs_pass"),), "accepted and not read"),
        Row("at most 2048 inputs, none empty", ((EMBED, "test_what_cannot_be_embedded_is_named"),)),
        Row(
            "the longest input; 300,000 tokens a request",
            ((EMBED, "test_the_real_model_names_what_it_cannot_do"),),
            "an input has the model's limit; all of them together the limit of a body",
        ),
        Row(
            "`encoding_format`: `base64`, which the client asks for by itself",
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
        Row("create with text and `tools`", ((RESPONSES, "test_a_function_is_called_and_its_output_read"),)),
        Row("`model`, `input`, `instructions`", ((RESPONSES, "test_messages_of_every_kind_are_read"),)),
        Row(
            "`max_output_tokens`, `temperature`, `top_p`, `parallel_tool_calls`",
            ((RESPONSES, "test_sampling_and_more_than_openai_takes_reaches_the_vehicle"),),
        ),
        Row("`tool_choice`", ((RESPONSES, "test_a_choice_of_tools_is_one_that_every_engine_can_follow"),)),
        Row("`text`: `json_schema`, `json_object`", ((RESPONSES, "test_json_schema_and_json_object"),)),
        Row(
            "`include`, `top_logprobs`",
            ((RESPONSES, "test_logprobs_stand_in_the_text"),),
            "logprobs; there is nothing else",
        ),
        Row("`truncation`", ((RESPONSES, "test_a_conversation_that_is_too_long_is_refused_or_shortened"),)),
        Row("`store`", ((KEPT, "test_a_response_is_kept_unless_the_customer_says_no"),)),
        Row(
            "`metadata`, `service_tier`, `user`, `safety_identifier`, `prompt_cache_key`, `max_tool_calls`",
            ((RESPONSES, "test_what_was_asked_is_shown_again"),),
        ),
        Row(
            "`prompt_cache_options`, `prompt_cache_retention`",
            ((RESPONSES, "test_what_was_asked_is_shown_again"),),
            "accepted; they change no answer",
        ),
        Row(
            "`reasoning`, other than `none`",
            ((RESPONSES, "test_what_cannot_be_served_is_refused_by_name"),),
            "refused by name: the models do not reason in hiding",
        ),
        Row(
            "`stream_options`, `include_obfuscation`",
            ((RESPONSES, "test_what_cannot_be_served_is_refused_by_name"),),
            "accepted with a stream, and nothing is added",
        ),
        Row("every required key", ((RESPONSES, "test_a_response_has_every_field_that_openai_requires"),)),
        Row("`stream`: events, each with its number", ((STREAM, "test_a_text"), (STREAM, "test_function_calls"))),
        Row(
            "`response.failed`, `response.incomplete`",
            (
                (STREAM, "test_a_failure_after_the_first_text_is_an_event"),
                (STREAM, "test_cancelling_stops_the_vehicle_and_ends_the_stream"),
            ),
        ),
        Row(
            "`background`, and a stream that goes on after `starting_after`",
            ((STREAM, "test_the_rest_of_a_stream_after_every_event_of_it"),),
        ),
        Row("retrieve, delete", ((KEPT, "test_a_deleted_response_is_gone"),)),
        Row("cancel", ((KEPT, "test_cancelling"),)),
        Row("input items, with `after`, `limit`, `order`", ((KEPT, "test_input_items_in_pages"),)),
        Row("`previous_response_id`", ((KEPT, "test_a_conversation_is_rebuilt_from_what_is_kept"),)),
        Row("an empty probe", ((RESPONSES, "test_a_probe_without_input_is_answered"),)),
        Row(
            "tools that are no functions are skipped",
            ((RESPONSES, "test_tools_that_openai_runs_are_left_out_and_named"),),
        ),
        Row("an unknown `previous_response_id`", ((KEPT, "test_a_conversation_with_a_gap_is_refused"),)),
        Row(
            "`/v1/responses/input_tokens`, `/compact`",
            ((CONFORMS, "test_what_is_not_served_is_said_so"),),
            "not served: only the engine on a vehicle knows the tokens",
        ),
        Row(
            "the WebSocket `connect`",
            ((ERRORS, "test_a_websocket_is_turned_away"),),
            "not served: streams of events do the same",
        ),
        Row(
            "`conversation`, `prompt`, `context_management`, `moderation`, `access_programs`, `background_options`, "
            "`image`",
            ((RESPONSES, "test_what_cannot_be_served_is_refused_by_name"),),
            "refused by name: they are objects or services of OpenAI's",
        ),
    ],
    "`/v1/files`": [
        Row(
            "upload of a `file` with `purpose` and `expires_after`",
            ((FILES, "test_a_file_comes_back_as_it_went"), (FILES, "test_bad_forms_are_refused_by_name")),
        ),
        Row(
            "`status`, `status_details`",
            ((OPENAPI, "test_real_answers_are_as_described"),),
            "always `processed` and null: a file is there or is not",
        ),
        Row("the file object", ((OPENAPI, "test_real_answers_are_as_described"),)),
        Row("512 MB, and 200 MB for batches", ((FILES, "test_a_file_at_its_limit_is_accepted"),)),
        Row(
            "2.5 TB a project, 1,000 uploads a minute",
            ((FILES, "test_a_full_disk_is_said_and_leaves_nothing"),),
            "the operator's disk is the limit; it is answered with 507",
        ),
        Row("list with `after`, `limit`, `order`, `purpose`", ((FILES, "test_files_are_listed_in_pages"),)),
        Row(
            "retrieve, delete, content",
            ((FILES, "test_a_file_comes_back_as_it_went"), (FILES, "test_a_deleted_file_is_gone_with_its_bytes")),
        ),
        Row("batch files expire after 30 days", ((FILES, "test_batch_files_expire_after_30_days_by_default"),)),
    ],
    "`/v1/batches`": [
        Row(
            "create: `input_file_id`, `endpoint`, `completion_window`, `metadata`, `output_expires_after`",
            (
                (BATCHES, "test_a_bad_batch_is_refused_by_name"),
                (BATCHES, "test_a_missing_or_wrong_input_file_is_refused"),
            ),
        ),
        Row("for chat completions and completions", ((BATCHES, "test_completions_are_served_in_batches"),)),
        Row("for embeddings", (("test_api_embedding_batches", "test_embeddings_run_in_a_batch"),)),
        Row("for responses", ((ANSWERS, "test_responses_run_in_a_batch"),)),
        Row(
            "responses of a batch by their id",
            ((ANSWERS, "test_responses_run_in_a_batch"),),
            "they stand in the output file alone, and say `store: false`; OpenAI does not say what holds there",
        ),
        Row(
            "`background`, `previous_response_id`, `store: true` of a line",
            ((ANSWERS, "test_a_bad_line_fails_the_batch_with_its_line_and_field"),),
            "refused by name",
        ),
        Row(
            "for moderations, images, videos",
            ((BATCHES, "test_a_bad_batch_is_refused_by_name"),),
            "refused by name: there is no such endpoint here",
        ),
        Row("`stream: true` in a line is refused", ((BATCHES, "test_a_bad_line_fails_the_batch_with_its_place"),)),
        Row(
            "50,000 embedding inputs over a batch",
            ((EMBED, "test_a_line_whose_answer_would_be_too_large_says_how_many_inputs_fit"),),
            "the bound is that of each answer",
        ),
        Row("`errors` with `code`, `message`, `param`, `line`", ((BATCHES, "test_the_errors_shown_are_limited"),)),
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
        Row(
            "a line answered with an error; both files optional",
            (
                ("test_cell_batches", "test_lines_that_a_model_refuses_stand_in_the_error_file"),
                (BATCHES, "test_a_batch_expires_and_says_so_line_by_line"),
            ),
        ),
        Row(
            "`batch_expired`, `batch_cancelled`; what is finished is charged",
            (
                ("test_cell_batches", "test_when_the_window_closes_finished_lines_are_kept_and_the_others_named"),
                ("test_cell_batches", "test_a_cancelled_batch_keeps_what_runs_and_names_the_rest"),
            ),
        ),
        Row("`usage` of the batch, `model`", ((BATCHES, "test_a_batch_runs_to_its_end"),)),
        Row("output files are deleted after 30 days", ((FILES, "test_expired_files_go_and_others_stay"),)),
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
        Row(
            "events of evals, fine-tuning, video, agents, realtime",
            ((HOOKS, "test_what_is_no_webhook_is_refused"),),
            "refused by name: there are no such objects here",
        ),
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
        Row(
            "`Retry-After` in whole seconds",
            ((LIMITS, "test_too_many_requests_get_a_429_that_the_client_understands"),),
        ),
        Row("`insufficient_quota`", (), "no account has a quota: the operator revokes keys"),
    ],
    "The rest of OpenAI's API": [
        Row(
            "`moderations`, `images`, `audio`, `videos`, `realtime`, `live`, `evals`, `fine_tuning`, `vector_stores`, "
            "`containers`, `skills`, `decisions`, `content_provenance_checks`, `safety`, `beta` (assistants)",
            ((CONFORMS, "test_what_is_not_served_is_said_so"),),
            "vehicles run small models of text and vectors",
        ),
        Row(
            "`conversations`",
            ((CONFORMS, "test_what_is_not_served_is_said_so"),),
            "`previous_response_id` does what is needed of it",
        ),
        Row(
            "`uploads` in parts",
            ((CONFORMS, "test_what_is_not_served_is_said_so"),),
            "a file of the largest size goes up in one request, straight to disk",
        ),
        Row("`admin`: organisations and projects", (), "`motorpool keys` does what is needed of it"),
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
