"""Requests that must be refused: (name, body, words that the error must contain)."""

from __future__ import annotations

import json


def _inputs(value: object) -> bytes:
    return json.dumps({"inputs": value}).encode()


def _parameters(value: object) -> bytes:
    return json.dumps({"inputs": "Write 7 in words.", "parameters": value}).encode()


def _raw(parameter: str, value: str) -> bytes:
    """A value that json.dumps would not write."""
    return b'{"inputs": "x", "parameters": {"%s": %s}}' % (parameter.encode(), value.encode())


BROKEN_JSON = [
    ("empty body", b"", "body is empty"),
    ("blank body", b" \r\n\t", "body is empty"),
    ("not JSON", b"hello", "not JSON: Expecting value at line 1 column 1"),
    ("cut short", b'{"inputs": "x"', "not JSON"),
    ("trailing comma", b'{"inputs": "x",}', "not JSON"),
    ("two objects", b'{"inputs": "x"}{"inputs": "y"}', "not JSON: Extra data"),
    ("single quotes", b"{'inputs': 'x'}", "not JSON"),
    ("comment", b'{"inputs": "x"} // y', "not JSON"),
    ("raw newline in a string", b'{"inputs": "a\nb"}', "Invalid control character"),
    ("bad escape", b'{"inputs": "\\x41"}', "Invalid \\escape"),
    ("not UTF-8", b'{"inputs": "\xff"}', "not UTF-8: byte 0xff at offset 12"),
    ("UTF-16", '{"inputs": "x"}'.encode("utf-16"), "not UTF-8"),
    ("cut UTF-8", b'{"inputs": "\xc3"}', "not UTF-8"),
    ("UTF-8 surrogate bytes", b'{"inputs": "\xed\xa0\x80"}', "not UTF-8"),
    ("deep arrays", b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    ("a number of 5000 digits", _raw("seed", "9" * 5000), "too many digits"),
    ("NaN", _raw("temperature", "NaN"), "NaN is not a JSON number"),
    ("Infinity", _raw("temperature", "Infinity"), "Infinity is not a JSON number"),
    ("-Infinity", _raw("length_penalty", "-Infinity"), "-Infinity is not a JSON number"),
    ("1e400", _raw("temperature", "1e400"), "'1e400' is too large"),
    ("-1e400", _raw("length_penalty", "-1e400"), "'-1e400' is too large"),
    ("a field twice", b'{"inputs": "a", "inputs": "b"}', "'inputs' occurs twice"),
    ("a parameter twice", _raw("top_k", '1, "top_k": 2'), "'top_k' occurs twice"),
]

WRONG_SHAPE = [
    ("a string as body", b'"hello"', "must be a JSON object"),
    ("a list as body", b'[{"inputs": "x"}]', "must be a JSON object"),
    ("a number as body", b"1", "must be a JSON object"),
    ("null as body", b"null", "must be a JSON object"),
    ("no inputs", b"{}", "'inputs' is missing"),
    ("null inputs", _inputs(None), "'inputs' is missing"),
    ("a number as inputs", _inputs(5), "must be a string or a list of strings, got 5"),
    ("a boolean as inputs", _inputs(True), "must be a string or a list of strings, got True"),
    ("an object as inputs", _inputs({"text": "x"}), "must be a string or a list of strings"),
    ("an empty list", _inputs([]), "'inputs' is an empty list"),
    ("an empty string", _inputs(""), "inputs must not be empty or blank, got ''"),
    ("a blank string", _inputs(" \n\t"), "inputs must not be empty or blank"),
    ("an ideographic space", _inputs("\u3000"), "inputs must not be empty or blank"),
    ("a number in the list", _inputs(["a", 7]), "inputs[1] must be a string, got 7"),
    ("null in the list", _inputs(["a", "b", None]), "inputs[2] must be a string, got None"),
    ("a list in the list", _inputs([["a"]]), "inputs[0] must be a string, got ['a']"),
    ("an empty string in the list", _inputs(["a", ""]), "inputs[1] must not be empty or blank"),
    ("half a surrogate pair", b'{"inputs": "a\\ud83d"}', "half a surrogate pair at character 1"),
    (
        "half a pair in the list",
        b'{"inputs": ["a", "\\udc00"]}',
        "inputs[1] holds half a surrogate",
    ),
    ("a pair in wrong order", b'{"inputs": "\\udc00\\ud83d"}', "half a surrogate pair"),
    ("an unknown field", b'{"inputs": "x", "foo": 1}', "unknown field 'foo'; allowed are inputs"),
    ("a misspelt field", b'{"input": "x"}', "unknown field 'input'; did you mean 'inputs'?"),
    ("parameters misspelt", b'{"inputs": "x", "parameter": {}}', "did you mean 'parameters'?"),
    ("a field of an odd name", b'{"inputs": "x", "\\n\\u00e9": 1}', "unknown field '\\n\\xe9'"),
    ("parameters a list", _parameters([]), "'parameters' must be an object, got []"),
    ("parameters a string", _parameters("{}"), "'parameters' must be an object, got '{}'"),
    ("parameters a number", _parameters(1), "'parameters' must be an object, got 1"),
    ("too long an input", _inputs("word " * 5000), "tokens, allowed are 1024"),
    ("too long in the list", _inputs(["a", "word " * 5000]), "inputs[1]: the input has"),
]

WRONG_PARAMETERS = [
    ("unknown", _parameters({"foo": 1}), "unknown parameter 'foo'; known are max_new_tokens"),
    ("misspelt", _parameters({"temprature": 1}), "did you mean 'temperature'?"),
    ("in capitals", _parameters({"TOP_K": 1}), "did you mean 'top_k'?"),
    ("hyphenated", _parameters({"top-p": 0.5}), "did you mean 'top_p'?"),
    ("no name", _parameters({"": 1}), "unknown parameter ''"),
    ("max_new_tokens zero", _parameters({"max_new_tokens": 0}), "an integer from 1"),
    ("max_new_tokens negative", _parameters({"max_new_tokens": -5}), "got -5"),
    (
        "max_new_tokens above",
        _parameters({"max_new_tokens": 513}),
        "at most 512 (option.max_output",
    ),
    ("max_new_tokens text", _parameters({"max_new_tokens": "20"}), "got '20'"),
    ("max_new_tokens fraction", _parameters({"max_new_tokens": 1.5}), "got 1.5"),
    ("max_new_tokens boolean", _parameters({"max_new_tokens": True}), "got True"),
    ("max_new_tokens list", _parameters({"max_new_tokens": [20]}), "got [20]"),
    ("max_new_tokens huge", _parameters({"max_new_tokens": 10**400}), "an integer from 1"),
    ("by its alias", _parameters({"max_seq_len": 0}), "parameter 'max_seq_len' must be an integer"),
    ("aliases differ", _parameters({"max_length": 9, "max_tokens": 8}), "mean the same and differ"),
    (
        "min above max",
        _parameters({"min_length": 9, "max_length": 8}),
        "at most max_new_tokens (8)",
    ),
    ("min negative", _parameters({"min_new_tokens": -1}), "an integer from 0"),
    ("do_sample text", _parameters({"do_sample": "yes"}), "true or false, got 'yes'"),
    ("do_sample number", _parameters({"do_sample": 1}), "true or false, got 1"),
    ("temperature negative", _parameters({"temperature": -0.1}), "from 0 to 1000000, got -0.1"),
    ("temperature text", _parameters({"temperature": "hot"}), "a number from 0"),
    ("temperature boolean", _parameters({"temperature": True}), "a number from 0"),
    ("temperature huge", _parameters({"temperature": 10**400}), "a number from 0"),
    ("temperature object", _parameters({"temperature": {}}), "a number from 0"),
    ("top_k negative", _parameters({"top_k": -1}), "an integer from 0"),
    ("top_k fraction", _parameters({"top_k": 0.5}), "an integer from 0"),
    ("top_p above", _parameters({"top_p": 1.01}), "a number from 0 to 1, got 1.01"),
    ("top_p negative", _parameters({"top_p": -1}), "a number from 0 to 1"),
    ("typical_p above", _parameters({"typical_p": 2}), "a number from 0 to 1"),
    ("typical_p text", _parameters({"typical_p": "0.9"}), "a number from 0 to 1, got '0.9'"),
    ("num_beams zero", _parameters({"num_beams": 0}), "an integer from 1"),
    ("num_beams above", _parameters({"beam_width": 17}), "at most 16 (option.max_rows), got 17"),
    ("length_penalty text", _parameters({"length_penalty": "1"}), "a number from -100 to 100"),
    ("early_stopping text", _parameters({"early_stopping": "always"}), 'true, false or "never"'),
    ("n without sampling", _parameters({"n": 2}), "at most num_beams (1) unless"),
    ("n above", _parameters({"n": 17, "do_sample": True}), "at most 16 (option.max_rows)"),
    ("seed negative", _parameters({"seed": -1}), "an integer from 0"),
    ("seed above", _parameters({"seed": 2**64}), "to 18446744073709551615"),
    ("seed fraction", _parameters({"seed": 0.5}), "an integer from 0"),
    ("repetition_penalty zero", _parameters({"repetition_penalty": 0}), "a number above 0"),
    ("repetition_penalty negative", _parameters({"repetition_penalty": -1.2}), "got -1.2"),
    ("repetition_penalty above", _parameters({"repetition_penalty": 101}), "above 0, to 100"),
    ("repetition_penalty list", _parameters({"repetition_penalty": [1.2]}), "got [1.2]"),
    ("presence_penalty above", _parameters({"presence_penalty": 3}), "from -2 to 2"),
    ("presence_penalty text", _parameters({"presence_penalty": "1"}), "from -2 to 2, got '1'"),
    ("frequency_penalty below", _parameters({"frequency_penalty": -3}), "from -2 to 2"),
    ("frequency_penalty boolean", _parameters({"frequency_penalty": True}), "got True"),
    ("no_repeat_ngram_size", _parameters({"no_repeat_ngram_size": -1}), "an integer from 0"),
    ("no_repeat_ngram_size half", _parameters({"no_repeat_ngram_size": 2.5}), "got 2.5"),
    ("stop a number", _parameters({"stop": 5}), "a string, a list of strings"),
    ("stop mixed", _parameters({"stop": ["a", 5]}), "a string, a list of strings"),
    ("stop an empty string", _parameters({"stop": [""]}), "an empty string or half a"),
    ("stop half a surrogate pair", _raw("stop", '"a\\ud83d"'), "half a surrogate pair is none"),
    ("bad words half a pair", _raw("bad_words", '["\\udc00"]'), "half a surrogate pair is none"),
    ("stop ids without ends", _parameters({"stop_words_list": [[1, 2, 3]]}), "end offsets"),
    ("stop ids ends too far", _parameters({"stop_words_list": [[1], [2]]}), "end offsets"),
    ("stop ids negative", _parameters({"stop_words_list": [[-1], [1]]}), "end offsets"),
    ("bad words an object", _parameters({"bad_words": {}}), "a string, a list of strings"),
    (
        "bad words blank",
        _parameters({"bad_words": ["cat", " "]}),
        "must hold words of this model's",
    ),
    ("bad words of padding", _parameters({"bad_words": [[640], [1]]}), "tokens, got (640,)"),
    ("bad words the end", _parameters({"bad_words": "</s>"}), "must not hold the end of the text"),
    ("bad words the end as id", _parameters({"bad_words": [[1], [1]]}), "send ignore_eos_token"),
    ("details text", _parameters({"details": "true"}), "true or false"),
    ("top_n_tokens above", _parameters({"top_n_tokens": 21}), "an integer from 0 to 20"),
    ("truncate zero", _parameters({"truncate": 0}), "true, false or the most input tokens"),
    ("truncate above", _parameters({"truncate": 2000}), "at most 1024 (option.max_input_tokens)"),
    ("stream text", _parameters({"stream": "yes"}), "true or false"),
    ("stream not supported yet", _parameters({"stream": True}), "is not supported by backend"),
    ("stream beside", b'{"inputs": "x", "stream": 1}', "parameter 'stream' must be true or false"),
    (
        "stream twice",
        b'{"inputs": "x", "stream": true, "parameters": {"stream": false}}',
        "send one of them",
    ),
    (
        "stream with beams",
        _parameters({"stream": True, "num_beams": 2}),
        "'stream' must be false with num_beams > 1",
    ),
]

BAD_REQUESTS = BROKEN_JSON + WRONG_SHAPE + WRONG_PARAMETERS
