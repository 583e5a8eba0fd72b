// This file is empty: its presence lets the compiler accept functions without a body, which fork.go links to the runtime.
