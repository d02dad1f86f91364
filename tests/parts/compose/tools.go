//go:build tools

// Package parts pins what tests/parts/compose.sh builds.
package parts

import _ "github.com/docker/compose/v2/cmd"
