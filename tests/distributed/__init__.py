"""Many small cases on several processes: ``cases`` is the table, ``run`` the harness. A new objective adds rows."""
