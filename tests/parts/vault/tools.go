//go:build tools

// Package parts pins what tests/parts/vault.sh builds.
package parts

import _ "github.com/hashicorp/vault"
