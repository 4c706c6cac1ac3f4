"""The command `tokenbridge`: its modules parse options, call a public function, and print."""
