-- Version 6: what is below a millionth is kept, and a live request is paid once whatever it moves.

-- Of owners ("owner:...") what is owed, of customers ("customer:...") and jobs ("job:...") what is not charged yet, in
-- 10^-18 of the currency unit: less than a millionth each. A job's goes when its files are written.
CREATE TABLE rest (
  name TEXT PRIMARY KEY,
  atto INTEGER NOT NULL CHECK (atto >= 0 AND atto < 1000000000000)
) STRICT, WITHOUT ROWID;

-- Live requests that were paid: one row each, ever, also where it came to no whole millionth.
CREATE TABLE paid_request (
  request_id TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;
