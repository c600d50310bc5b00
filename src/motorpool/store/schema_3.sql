-- Version 3: responses, as /v1/responses keeps them. Everything in a BLOB here is a customer's and is read by nobody else.

CREATE TABLE response (
  response_no INTEGER PRIMARY KEY,
  response_id TEXT NOT NULL UNIQUE,
  account TEXT NOT NULL,
  previous_id TEXT,                     -- the response whose conversation this one goes on with
  status TEXT NOT NULL,
  background INTEGER NOT NULL,
  created_ms INTEGER NOT NULL,
  ended_ms INTEGER,
  expires_ms INTEGER NOT NULL,          -- never before that of a response that goes on with this one
  facts BLOB NOT NULL,                  -- JSON: what the response object says from its beginning on
  items BLOB NOT NULL,                  -- JSON: its own input items
  body BLOB,                            -- JSON: what vehicles are asked, until it has ended
  result BLOB,                          -- JSON: the response object, from its end on
  size_bytes INTEGER NOT NULL           -- the space that it takes, its pieces included from its end on
) STRICT;
CREATE INDEX response_open ON response (account) WHERE ended_ms IS NULL;
CREATE INDEX response_by_account ON response (account, expires_ms, response_no) WHERE ended_ms IS NOT NULL;
CREATE INDEX response_by_expiry ON response (expires_ms) WHERE ended_ms IS NOT NULL;

-- What the events of a background response are told from: JSON arrays, each beginning with piece number `first`.
CREATE TABLE response_piece (
  response_no INTEGER NOT NULL REFERENCES response ON DELETE CASCADE,
  first INTEGER NOT NULL,
  pieces BLOB NOT NULL,
  PRIMARY KEY (response_no, first)
) STRICT, WITHOUT ROWID;

-- How much each account keeps. The triggers are the only ones who write here.
CREATE TABLE response_space (
  account TEXT PRIMARY KEY,
  responses INTEGER NOT NULL,
  size_bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TRIGGER response_space_i AFTER INSERT ON response BEGIN
  INSERT INTO response_space VALUES (new.account, 1, new.size_bytes)
  ON CONFLICT (account) DO UPDATE SET responses = responses + 1, size_bytes = size_bytes + new.size_bytes;
END;
CREATE TRIGGER response_space_u AFTER UPDATE OF size_bytes ON response BEGIN
  UPDATE response_space SET size_bytes = size_bytes + new.size_bytes - old.size_bytes WHERE account = new.account;
END;
CREATE TRIGGER response_space_d AFTER DELETE ON response BEGIN
  UPDATE response_space SET responses = responses - 1, size_bytes = size_bytes - old.size_bytes WHERE account = old.account;
END;
