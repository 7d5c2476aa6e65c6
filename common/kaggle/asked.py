"""Run as a program of its own: asks Kaggle for what its command line does not print, as one line of JSON.

`python -P common/kaggle/asked.py submissions SLUG`. The kaggle library prints and makes folders when it is imported,
so no process of the kit itself ever imports it.
"""

import json
import sys

PAGE = 100


def submissions(api, slug: str) -> dict:
    """All submissions of the account, newest first, with the reason of an error; and how many are left today."""
    rows, page = [], 1
    while True:
        found = api.competition_submissions(slug, page_number=page, page_size=PAGE) or []
        rows += [
            {
                "ref": str(row.ref),
                "date": row.date.isoformat() if row.date else "",
                "file": row.file_name or "",
                "message": row.description or "",
                "status": row.status.name,
                "public": row.public_score or "",
                "private": row.private_score or "",
                "reason": row.error_description or "",
            }
            for row in found
        ]
        if len(found) < PAGE:
            break
        page += 1
    try:
        left = api.competition_get_submission_limits(slug).num_allowed_now
    except Exception as error:  # whatever it is, a submission may be possible: shown as unknown
        print(f"submission limits: {error}", file=sys.stderr)
        left = None
    return {"submissions": rows, "left": left}


def main(slug: str) -> int:
    from kaggle import api

    if not api._authenticated:
        print("401 Authentication required", file=sys.stderr)
        return 1
    try:
        print(json.dumps(submissions(api, slug)))
    except Exception as error:  # the kit explains it: any failure is one line here
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
